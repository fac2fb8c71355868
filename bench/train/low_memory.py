"""Loss of FusedAdamW at 7 bytes a parameter against fp32 weights and moments.

    python -m bench.train.low_memory [--steps 1000] [--seeds 3] [--text docs]
    python -m bench.train.low_memory --model MODEL --rate 1e-4 [--steps 150] [--seeds 2]

A Llama of two layers and 64 columns learns the words of the Markdown files under ``--text``; 512
words have an id of their own. With ``--model`` all weights of that folder's model are trained on
the tokens of these files instead. Each seed chooses the order of the batches, and the start of the
small Llama. All runs of a seed begin with the same bf16 numbers and see the same batches. The loss
is the mean over the last tenth of the steps; its noise is the spread over the seeds. ``--runs 2``
leaves out the weights without a master; ``--runs 4`` adds a second fp32 run whose batches are split
in two: it differs from the first only by rounding.
"""

import argparse
import json
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.support.measure import machine
from merit_fast.kernels.optimizer import FusedAdamW

VOCABULARY = 512
BATCH = 4
LENGTH = 32
# name -> dtype of weights, options of FusedAdamW, micro-batches of a step
RUNS: dict[str, tuple[torch.dtype, dict[str, Any], int]] = {
    "fp32": (torch.float32, {}, 1),
    "bf16, split8, int8 moments": (torch.bfloat16, {"master": "split8", "moments": "int8"}, 1),
    "bf16, nearest, no master": (torch.bfloat16, {"rounding": "nearest"}, 1),
    "fp32, two micro-batches": (torch.float32, {}, 2),
}


def words_of(folder: Path) -> Tensor:
    """Ids of all words; 0 stands for every rare one."""
    text = " ".join(file.read_text() for file in sorted(folder.rglob("*.md")))
    words = re.findall(r"\w+|[^\w\s]", text)
    common = Counter(words).most_common(VOCABULARY - 1)
    ids = {word: number + 1 for number, (word, _) in enumerate(common)}
    return torch.tensor([ids.get(word, 0) for word in words])


def new_model(seed: int, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).to(dtype)


def tokens_of(folder: Path, model: Path) -> Tensor:
    """Token ids of all files, by the model's own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    text = " ".join(file.read_text() for file in sorted(folder.rglob("*.md")))
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def load_whole(folder: Path, dtype: torch.dtype) -> Any:
    """The model of a folder, whose weights are rounded to bf16 first."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.train()
    return model.to(dtype)


def train(name: str, words: Tensor, seed: int, options: argparse.Namespace) -> float:
    """Mean loss of the last tenth of the steps."""
    dtype, keywords, parts = RUNS[name]
    steps = options.steps
    model = load_whole(options.model, dtype) if options.model else new_model(seed, dtype)
    optimizer = FusedAdamW(
        model.parameters(),
        lr=options.rate,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        seed=seed,
        **keywords,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=steps)
    numbers = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        starts = torch.randint(0, len(words) - LENGTH, (BATCH,), generator=numbers)
        rows = torch.stack([words[start : start + LENGTH] for start in starts.tolist()])
        total = 0.0
        for part in rows.chunk(parts):
            loss = model(input_ids=part, labels=part).loss / parts
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
    return statistics.mean(losses[-max(1, steps // 10) :])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train.low_memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", type=Path, default=Path("docs"))
    parser.add_argument("--model", type=Path, help="folder of a model; absent: the small Llama")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=3, choices=(2, 3, 4))
    options = parser.parse_args(arguments)
    names = list(RUNS)[: options.runs]
    text = options.text
    words = tokens_of(text, options.model) if options.model else words_of(text)
    report: dict[str, Any] = {**machine(), "torch": torch.__version__, "steps": options.steps}
    report["rate"] = options.rate
    losses: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in names:
            losses[name].append(round(train(name, words, seed, options), 4))
            difference = losses[name][-1] - losses["fp32"][-1]
            print(f"seed {seed} {name:28} {losses[name][-1]:.4f} {difference:+.4f}", flush=True)
    for name, values in losses.items():
        gaps = [value - exact for value, exact in zip(values, losses["fp32"], strict=True)]
        print(f"{name:28} {statistics.mean(values):.4f} {statistics.mean(gaps):+.4f}")
    report["losses"] = losses
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
