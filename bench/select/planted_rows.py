"""Planted rows in a pool: how well gradients find the rows of a few examples' task.

SmolLM2-135M in bf16, the demo's tasks, all parameters.

    OMP_NUM_THREADS=1 python -m bench.select.planted_rows [--rows 4] [--targets 3] [--tasks 28]
    [--bare] [--proj-dim 65536] [--max-side 2048] [--damping 0.1] [--json]

Every task gives ROWS rows to one pool. In turn each task is the target: TARGETS of its held-out
rows are the query, and the whole pool is ranked by its likeness to them. AUC is the probability
that a row of the task stands before a row of another. Tasks of one family share their inputs, so a
row of another task may hold the very words of the query. ``--bare`` leaves out the instruction,
which is the same text in all rows of a task.

Scores: BM25 on words; dot and cosine of gradients' sketches with the sum of the query's (cosine: of
unit vectors). ``adam`` divides by the root of the rows' mean squared gradient, as Adam would after
many steps at the base model; ``kfac`` multiplies by the inverse of K-FAC's factors. Both come from
all rows, without a label.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import merit_fast
from merit_fast.data import (
    DataConfig,
    DatasetConfig,
    Example,
    collate,
    load_mixture,
    load_tokenizer,
    pad_token_id,
)
from merit_fast.demo import default_cache, prepare_model
from merit_fast.demo.tasks import SYSTEM_MESSAGE, build_tasks
from merit_fast.kernels.sketch import CountSketch, matrix_shape
from merit_fast.model import load_model, target_losses
from merit_fast.sketch.gradients import GradientSketcher
from merit_fast.sketch.names import named_parameters

BATCH = 8
EPSILON = 1e-8  # Adam's
METHODS = (
    "random", "BM25", "dot", "cosine", "adam dot", "adam cosine", "kfac dot", "kfac cosine",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row of a task: in the pool, or in the query."""

    task: str
    is_query: bool
    text: str
    example: Example


def build_rows(
    model: Path, folder: Path, num_tasks: int, num_rows: int, num_targets: int, bare: bool
) -> tuple[list[Row], int]:
    """Rows of the first tasks, tokenized as a run does; the padding token's id."""
    tokenizer = load_tokenizer(str(model))
    tasks = dict(list(build_tasks(quick=False).items())[:num_tasks])
    rows = []
    for name, task in tasks.items():
        for is_query, pairs in (
            (False, task.train[:num_rows]),
            (True, task.held_out[:num_targets]),
        ):
            texts = [text if bare else f"{task.instruction}\n{text}" for text, _ in pairs]
            lines = [chat(text, answer) for text, (_, answer) in zip(texts, pairs, strict=True)]
            file = folder / f"{name}.{is_query}.jsonl"
            file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            entry = DatasetConfig(name=name, path=str(file))
            (dataset,) = load_mixture([entry], tokenizer, DataConfig(), part="train")
            if dataset.num_examples != len(pairs):
                raise SystemExit(f"{name}: {len(pairs)} rows gave {dataset.num_examples} examples")
            for index, (text, (_, answer)) in enumerate(zip(texts, pairs, strict=True)):
                rows.append(Row(name, is_query, f"{text} {answer}", dataset.examples[index]))
    return rows, pad_token_id(tokenizer)


def chat(text: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_MESSAGE},
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]
    }


def bm25(pool: Sequence[str], query: Sequence[str], k: float = 1.5, b: float = 0.75) -> Tensor:
    """[len(pool)] BM25 of the query's words (Robertson & Zaragoza 2009)."""
    documents = [Counter(re.findall(r"\w+", text.lower())) for text in pool]
    lengths = [sum(document.values()) for document in documents]
    mean = statistics.fmean(lengths)
    frequency = Counter(word for document in documents for word in document)
    words = Counter(re.findall(r"\w+", " ".join(query).lower()))
    scores = torch.zeros(len(pool), dtype=torch.float64)
    for index, (document, length) in enumerate(zip(documents, lengths, strict=True)):
        for word, times in words.items():
            count = document[word]
            seen = frequency[word]
            rarity = math.log1p((len(pool) - seen + 0.5) / (seen + 0.5))
            gain = count * (k + 1) / (count + k * (1 - b + b * length / mean))
            scores[index] += times * rarity * gain
    return scores


def backward_passes(model: Any, rows: Sequence[Row], pad: int, size: int) -> Iterator[int]:
    """Runs the backward pass of each batch's mean losses; yields its number of rows."""
    for start in range(0, len(rows), size):
        chosen = [row.example for row in rows[start : start + size]]
        losses = target_losses(model, collate(chosen, [0] * len(chosen), pad))
        sums = losses.loss.new_zeros(len(chosen)).index_add(0, losses.example, losses.loss)
        counts = torch.zeros_like(sums).index_add(0, losses.example, torch.ones_like(losses.loss))
        (sums / counts).sum().backward()  # type: ignore[no-untyped-call]
        yield len(chosen)


def squared_gradients(model: Any, rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """Adam's multipliers 1 / (sqrt(v) + eps), with v the mean squared gradient of the rows."""
    squares = {
        name: torch.zeros(matrix_shape(parameter.shape))
        for name, parameter in named_parameters(model)
    }
    for _ in backward_passes(model, rows, pad, 1):
        for name, parameter in named_parameters(model):
            assert parameter.grad is not None
            gradient = parameter.grad.float().view(squares[name].shape)
            squares[name].addcmul_(gradient, gradient, value=1 / len(rows))
            parameter.grad = None
    return {name: 1 / (square.sqrt() + EPSILON) for name, square in squares.items()}


def sketches_of(
    model: Any, rows: Sequence[Row], pad: int, sketch: CountSketch, **preconditioner: Any
) -> Tensor:
    """[rows, D] sketches in float64."""
    result = []
    with GradientSketcher(model, sketch, **preconditioner) as sketcher:
        for size in backward_passes(model, rows, pad, BATCH):
            result.append(sketcher.take().double())
            assert len(result[-1]) == size
    return torch.cat(result)


def note(seconds: dict[str, float]) -> None:
    print(f"CPU seconds so far: {seconds}", file=sys.stderr, flush=True)


def auc(scores: Tensor, is_hit: Tensor) -> float:
    """Probability that a hit stands before another row; ties count as a half."""
    difference = scores[is_hit].unsqueeze(1) - scores[~is_hit]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def rank(rows: Sequence[Row], sketches: dict[str, Tensor]) -> dict[str, list[float]]:
    """Method -> AUC of every target."""
    in_pool = torch.tensor([not row.is_query for row in rows])
    pool = [row for row in rows if not row.is_query]
    generator = torch.Generator().manual_seed(0)
    result: dict[str, list[float]] = {method: [] for method in METHODS}
    for task in dict.fromkeys(row.task for row in rows):
        is_hit = torch.tensor([row.task == task for row in pool])
        asked = torch.tensor([row.is_query and row.task == task for row in rows])
        texts = [row.text for row in rows if row.is_query and row.task == task]
        scores = {
            "random": torch.rand(len(pool), generator=generator),
            "BM25": bm25([row.text for row in pool], texts),
        }
        for prefix, values in sketches.items():
            unit = values / values.norm(dim=1, keepdim=True)
            scores[f"{prefix}dot"] = values[in_pool] @ values[asked].sum(0)
            scores[f"{prefix}cosine"] = unit[in_pool] @ unit[asked].sum(0)
        for method in METHODS:
            result[method].append(auc(scores[method], is_hit))
    return result


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """AUC of every method and target, and the CPU seconds of every kind of gradient."""
    path = prepare_model(arguments.cache)
    with tempfile.TemporaryDirectory() as folder:
        rows, pad = build_rows(
            path,
            Path(folder),
            arguments.tasks,
            arguments.rows,
            arguments.targets,
            arguments.bare,
        )
    model = load_model(str(path), "bf16")
    sketch = CountSketch(arguments.proj_dim)
    sketches: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    start = time.process_time()
    sketches[""] = sketches_of(model, rows, pad, sketch)
    seconds["plain"] = time.process_time() - start
    note(seconds)
    start = time.process_time()
    scales = squared_gradients(model, rows, pad)
    sketches["adam "] = sketches_of(model, rows, pad, sketch, scales=scales, check="never")
    seconds["adam"] = time.process_time() - start
    note(seconds)
    del scales
    start = time.process_time()
    with merit_fast.kfac_factors(model, max_side=arguments.max_side, check="never") as collector:
        for _ in backward_passes(model, rows, pad, BATCH):
            collector.update()
    factors = collector.factors(arguments.damping)
    del collector  # its sums take as many bytes as the factors
    seconds["kfac factors"] = time.process_time() - start
    note(seconds)
    sketches["kfac "] = sketches_of(model, rows, pad, sketch, factors=factors, check="never")
    seconds["kfac"] = time.process_time() - start
    return {
        "pool": sum(not row.is_query for row in rows),
        "tokens": sum(len(row.example.input_ids) for row in rows),
        "factor_bytes": factors.num_bytes,
        "auc": rank(rows, sketches),
        "seconds": seconds,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: median, quartiles and least AUC over the targets."""
    lines = ["| score | AUC: median | quartiles | least |", "|---|---|---|---|"]
    for method, values in result["auc"].items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        lines.append(f"| {method} | {middle:.3f} | {low:.3f} to {high:.3f} | {min(values):.3f} |")
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())
    lines.append(f"\n{result['pool']} rows, {result['tokens']} tokens; CPU seconds: {seconds};")
    lines.append(f"factors {result['factor_bytes'] / 2**20:.0f} MiB")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--targets", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=28)
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--proj-dim", type=int, default=65536)
    parser.add_argument("--max-side", type=int, default=2048)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    result = measure(arguments)
    print(json.dumps(result) if arguments.json else table(result))


if __name__ == "__main__":
    main()
