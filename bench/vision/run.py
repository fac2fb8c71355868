"""A whole run on images: sixteen tasks of handwritten digits with conflicting answer formats.

    python -m bench.vision.run [--json] [--out DIR] [--rows 150] [--epochs 4] [--no-joint]

The base is a small Qwen2.5-VL, made from its config and trained to name the digit of a picture,
with its tower. The run then sketches the tasks, splits them into four groups, trains the branches
and a joint run with the tower frozen, merges and evaluates. Prints the arms as a Markdown table, or
one JSON object: seconds, and the measures of every arm.

Pictures of the base's training and of the tasks come from the same part of scikit-learn's digits;
the held-out rows show other pictures.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import merit_fast
from bench.vision.digits import WORDS, write_digit_tasks, write_named_digits
from merit_fast.data import DataConfig, DatasetConfig, load_mixture
from merit_fast.data import load_tokenizer_or_processor as load_processor
from merit_fast.model import model_fingerprint
from merit_fast.progress import SilentProgress
from merit_fast.train.config import TrainConfig
from merit_fast.train.stage import BranchJob, train_branch

_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>")
_END = "<|im_end|>"
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}
_TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
_TOWER = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
_PATCHES = {"patch_size": 14, "out_hidden_size": 128, "fullatt_block_indexes": [0, 1]}


def make_start(folder: Path) -> None:
    """Saves an untrained Qwen2.5-VL of 0.6 M parameters with its processor."""
    import transformers as t

    folder.mkdir(parents=True)
    tokenizer = _make_tokenizer()
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    t.Qwen2VLImageProcessorPil(size=size).save_pretrained(folder)
    settings = {"processor_class": "Qwen2_5_VLProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _TOKENS}
    config = t.Qwen2_5_VLConfig(
        text_config={**_TEXT, **_HEADS, "vocab_size": len(tokenizer), "rope_parameters": _ROPE},
        vision_config={**_TOWER, **_PATCHES},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = t.Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)


def _make_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"user\n assistant\n {word}" for word in WORDS] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*_TOKENS, _END)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=_END
    )


def train_base(start: Path, folder: Path, data: Path, epochs: int) -> Path:
    """Trains ``start`` with its tower to name the digit of a picture; returns the base's folder."""
    entry = write_named_digits(data)
    configs = [DatasetConfig(name="naming", path=entry["path"], media=entry["media"])]
    datasets = load_mixture(configs, load_processor(str(start)), DataConfig(), part="train")
    fingerprint = model_fingerprint(start)
    job = BranchJob("base", "base", 0, tuple(datasets), str(start), fingerprint, fingerprint)
    config = TrainConfig(epochs=epochs, learning_rate=2e-3, dtype="fp32", freeze=())
    folder.mkdir()
    train_branch(job, config, folder, SilentProgress())
    (folder / "branch.json").unlink()
    return folder


def write_run(out: Path, rows: int, epochs: int, joint: bool, random: int) -> Path:
    """Makes the base and the tasks; returns the YAML of a run of them."""
    make_start(out / "start")
    base = train_base(out / "start", out / "base", out / "naming", epochs=4)
    values = {
        "model": str(base),
        "mixture": write_digit_tasks(out / "tasks", num_train=rows, num_eval=40),
        "output": str(out / "run"),
        "split": {"groups": 4, "examples": 100, "dtype": "fp32"},
        "train": {
            "epochs": epochs,
            "learning_rate": 1e-3,
            "dtype": "fp32",
            "controls": {"joint": joint, "random": random},
        },
        "evaluate": {"dtype": "fp32", "max_new_tokens": 8},
    }
    file = out / "run.yml"
    file.write_text(json.dumps(values))
    return file


def run(out: Path, rows: int, epochs: int, joint: bool, random: int) -> dict[str, Any]:
    """Makes the base and runs all stages; the measures of every arm."""
    begin = time.perf_counter()
    file = write_run(out, rows, epochs, joint, random)
    base_s = time.perf_counter() - begin
    begin = time.perf_counter()
    merit_fast.run(file)
    return {
        "base_s": round(base_s, 1),
        "run_s": round(time.perf_counter() - begin, 1),
        "arms": json.loads((out / "run/evaluate/evaluate.json").read_text())["arms"],
        "datasets": json.loads((out / "run/split/split.json").read_text())["datasets"],
    }


def table(result: dict[str, Any]) -> str:
    """The arms as Markdown, and the tasks of each group."""
    lines = [
        "| arm | held-out loss | exact match % | displacement | train s |",
        "|---|---|---|---|---|",
    ]
    for name, arm in result["arms"].items():
        exact = 100 * arm["exact_match"]
        cells = [name, f"{arm['loss']:.3f}", f"{exact:.1f}", f"{arm['displacement']:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{arm['train_s'] or 0:.1f}"]) + " |")
    groups: dict[int, list[str]] = {}
    for dataset in result["datasets"]:
        groups.setdefault(dataset["group"], []).append(dataset["name"])
    lines.append("")
    lines += [f"group {group}: {', '.join(names)}" for group, names in sorted(groups.items())]
    lines.append(f"base {result['base_s']} s, run {result['run_s']} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="a new folder that keeps everything")
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--no-joint", action="store_true", help="leave out the joint run")
    parser.add_argument("--random", type=int, default=0, help="random splits, as controls")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        out = arguments.out or Path(folder) / "out"
        result = run(
            out, arguments.rows, arguments.epochs, not arguments.no_joint, arguments.random
        )
    print(json.dumps(result) if arguments.json else table(result))


if __name__ == "__main__":
    main()
