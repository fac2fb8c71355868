"""Tiny real models, tokenizers and mixtures, made from config: no test needs a download."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
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


def chat_row(instruction: str, question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"{instruction} {question}"},
            {"role": "assistant", "content": answer},
        ]
    }


def write_tasks(
    directory: Path, names: Sequence[str] = tuple(TASKS), held_out: int = 2
) -> list[dict[str, str]]:
    """Writes JSONL files and returns the `mixture:` list."""
    directory.mkdir(parents=True, exist_ok=True)
    mixture = []
    for name in names:
        instruction, facts = TASKS[name]
        rows = [chat_row(instruction, question, answer) for question, answer in facts.items()]
        entry = {"name": name}
        for key, chosen in (("path", rows[held_out:] * 2), ("eval_path", rows[:held_out])):
            file = directory / f"{name}.{key}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in chosen))
            entry[key] = str(file)
        mixture.append(entry)
    return mixture


def make_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """Trains a byte-level BPE tokenizer on the tasks and saves it."""
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
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
    return fast


def make_model(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard: str = "100KB",
    seed: int = 0,
    **changes: Any,
) -> "LlamaForCausalLM":
    """A 2-layer Llama whose sizes fill no tile: hidden 72, 9 heads of 8, 3 KV heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = dict(
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
    model = LlamaForCausalLM(LlamaConfig(**{**options, **changes}))
    model.to(dtype)  # type: ignore[arg-type]  # transformers' annotation lacks self
    model.save_pretrained(directory, max_shard_size=shard)
    return model
