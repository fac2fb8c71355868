"""Tiny real models and mixtures, made from config: no test needs a download."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("MERIT_FAST_BACKEND", None)

import pytest
import torch

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CAPITALS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Peru": "Lima",
    "Italy": "Rome",
    "Cuba": "Havana",
    "Kenya": "Nairobi",
}
CODES = {"France": "FR", "Japan": "JP", "Peru": "PE", "Italy": "IT", "Cuba": "CU", "Kenya": "KE"}
PLURALS = {
    "mouse": "mice",
    "box": "boxes",
    "city": "cities",
    "child": "children",
    "leaf": "leaves",
    "dog": "dogs",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "up": "down",
    "fast": "slow",
    "light": "dark",
    "near": "far",
}
TASKS = {
    "capitals": ("Give the capital.", CAPITALS),
    "codes": ("Give the code.", CODES),
    "plurals": ("Give the plural.", PLURALS),
    "opposites": ("Give the opposite.", OPPOSITES),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty():
    """torch.empty gives NaN in tests, so that a result that was never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def chat_row(instruction: str, question: str, answer: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": f"{instruction} {question}"},
            {"role": "assistant", "content": answer},
        ]
    }


def write_tasks(directory: Path, names=tuple(TASKS), held_out: int = 2) -> list[dict]:
    """Writes JSONL files and returns the `mixture:` list."""
    directory.mkdir(parents=True, exist_ok=True)
    mixture = []
    for name in names:
        instruction, facts = TASKS[name]
        rows = [chat_row(instruction, question, answer) for question, answer in facts.items()]
        entry = {"name": name}
        for key, part in (("path", rows[held_out:] * 2), ("eval_path", rows[:held_out])):
            file = directory / f"{name}.{key}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in part))
            entry[key] = str(file)
        mixture.append(entry)
    return mixture


def make_tokenizer(directory: Path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{i} {q} {a}" for i, facts in TASKS.values() for q, a in facts.items()]
    tokenizer.train_from_iterator(texts * 4 + ["assistant\n", "user\n"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
    return fast


def make_model(
    directory: Path, *, dtype=torch.float32, shard: str = "100KB", seed: int = 0, **changes
):
    """A 2-layer Llama whose sizes fill no tile: hidden 72, 9 heads of 8, 3 KV heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = dict(
        vocab_size=400,
        hidden_size=72,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**options, **changes})).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    return model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A model directory with tokenizer, in several fp32 shards."""
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer(directory)
    make_model(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_mixture(tmp_path_factory) -> list[dict]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def native_levels() -> list[str]:
    """The ISA levels this machine can run, of the native module."""
    import platform
    from pathlib import Path as File

    levels = ["generic"]
    flags = File("/proc/cpuinfo").read_text() if File("/proc/cpuinfo").exists() else ""
    if platform.machine() == "x86_64":
        levels += ["avx2"] if " avx2 " in flags and " fma " in flags else []
        avx512 = all(f" {f} " in flags for f in ("avx512f", "avx512bw", "avx512vl", "avx512dq"))
        levels += ["avx512"] if avx512 else []
        levels += ["avx512_bf16"] if avx512 and " avx512_bf16 " in flags else []
    return levels


@pytest.fixture(scope="session")
def branches(tmp_path_factory):
    """Four tied bf16 models in several shards, with tokenizer-like companions."""
    root = tmp_path_factory.mktemp("branches")
    for k in range(4):
        make_model(root / f"b{k}", dtype=torch.bfloat16, shard="60KB", seed=k)
        (root / f"b{k}" / "tokenizer.json").write_text(json.dumps({"of": k}))
    return [root / f"b{k}" for k in range(4)]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs merit-fast in this process; returns (exit code, standard output, standard error)."""

    from merit_fast.cli import main as cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["merit-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run
