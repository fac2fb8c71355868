"""Distance of sketched cosines of real gradients from the exact ones.

SmolLM2-135M, the demo's tasks, all parameters.

    python -m bench.sketch.accuracy DIR [--examples 16] [--seeds 8] [--proj-dims 16384,65536]
    [--model PATH] [--quick]

A task's gradient is that of the mean of its examples' losses: fp32 weights, one ordinary backward
pass, kept in DIR as a memory-mapped file (0.54 GB a task, 15 GB for all 28). Exact inner products
are sums in fp64 over these files; the sketches are those of ``flat_sketch``. Finished results are
kept: more seeds later cost only these seeds. The report has a table in units of 1/sqrt(D), its
goals and the parameters with the largest share of the gradients' squared norm.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.support.measure import Results
from merit_fast.data import (
    DataConfig,
    Dataset,
    DatasetConfig,
    collate,
    load_mixture,
    load_tokenizer,
    pad_token_id,
)
from merit_fast.demo import default_cache, prepare_mixture, prepare_model
from merit_fast.kernels.sketch import HASH_VERSION, CountSketch, flat_sketch, matrix_shape
from merit_fast.manifests.atomic import replace_file
from merit_fast.model import load_model, model_fingerprint, target_losses

COLUMNS = 1 << 20  # of all tasks' gradients at a time: the exact inner products need 28 x 8 MiB


@dataclass(frozen=True)
class Range:
    """Range of one parameter in a gradient file."""

    name: str
    start: int
    shape: tuple[int, int]  # rows and columns that are hashed

    @property
    def stop(self) -> int:
        return self.start + self.shape[0] * self.shape[1]


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def ranges_of(model: torch.nn.Module) -> list[Range]:
    """Ranges of all parameters in the model's order; a tied one counts once."""
    ranges = []
    start = 0
    for name, parameter in model.named_parameters():
        ranges.append(Range(name, start, matrix_shape(parameter.shape)))
        start = ranges[-1].stop
    return ranges


def load_tasks(directory: Path, model: Path, quick: bool) -> tuple[list[Dataset], int]:
    tokenizer = load_tokenizer(str(model))
    entries: list[dict[str, Any]] = [*prepare_mixture(directory / "tasks", quick=quick)]
    mixture = [DatasetConfig(**entry) for entry in entries]
    return load_mixture(mixture, tokenizer, DataConfig(), part="train"), pad_token_id(tokenizer)


def write_gradient(
    model: torch.nn.Module, dataset: Dataset, examples: int, pad: int, file: Path
) -> dict[str, float]:
    """Writes the gradient of the mean over examples of their mean losses, in float32.

    All parameters end to end.
    """
    chosen = dataset.examples[:examples]
    losses = target_losses(model, collate(chosen, [0] * len(chosen), pad))
    zeros = losses.loss.new_zeros(len(chosen))
    sums = zeros.index_add(0, losses.example, losses.loss)
    mean = (sums / zeros.index_add(0, losses.example, torch.ones_like(losses.loss))).mean()
    model.zero_grad()
    mean.backward()  # type: ignore[no-untyped-call]
    temporary = file.with_name(file.name + ".tmp")
    square = 0.0
    with open(temporary, "wb") as stream:
        for parameter in model.parameters():
            assert parameter.grad is not None
            square += float(parameter.grad.double().square().sum())
            stream.write(parameter.grad.contiguous().numpy().data)
    replace_file(temporary, file)
    return {"loss": float(mean.detach()), "norm": square**0.5, "examples": float(len(chosen))}


def mapped(file: Path, size: int) -> Tensor:
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.float32)


def exact_products(
    gradients: Sequence[Tensor], ranges: Sequence[Range]
) -> Iterator[tuple[str, Tensor]]:
    """[N, N] float64 inner products of the tasks' gradients, parameter by parameter."""
    for entry in ranges:
        products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
        for start in range(entry.start, entry.stop, COLUMNS):
            rows = torch.stack(
                [g[start : min(start + COLUMNS, entry.stop)] for g in gradients]
            ).double()
            products += rows @ rows.T
        yield entry.name, products


def sketch_gradient(gradient: Tensor, ranges: Sequence[Range], sketch: CountSketch) -> Tensor:
    out = torch.zeros(1, sketch.proj_dim)
    for entry in ranges:
        flat_sketch(
            gradient[entry.start : entry.stop].view(1, *entry.shape), entry.name, sketch, out=out
        )
    return out[0]


def cosines(products: Tensor) -> Tensor:
    norms = products.diagonal().sqrt()
    return products / norms / norms.unsqueeze(1)


def measure(
    arguments: argparse.Namespace, model: Path, results: Results, data: tuple[list[Dataset], int]
) -> None:
    """Measures gradients, exact inner products and sketches that the results lack."""
    datasets, pad = data
    done = {(entry["proj_dim"], entry["seed"]) for entry in results.of("sketch")}
    wanted = [
        pair
        for pair in itertools.product(arguments.proj_dims, range(arguments.seeds))
        if pair not in done
    ]
    if not wanted and results.of("exact"):
        return
    network = load_model(str(model), "fp32")
    ranges = ranges_of(network)
    files = [
        arguments.directory / f"{dataset.name}.{arguments.examples}.f32" for dataset in datasets
    ]
    for dataset, file in zip(datasets, files, strict=True):
        is_known = any(entry["task"] == dataset.name for entry in results.of("gradient"))
        if not file.exists() or not is_known:
            figures = write_gradient(network, dataset, arguments.examples, pad, file)
            results.add({"gradient": {"task": dataset.name, **figures}})
            words = f"loss {figures['loss']:.3f}, norm {figures['norm']:.3f}"
            note(f"gradient of {dataset.name}: {words}")
    del network
    gradients = [mapped(file, ranges[-1].stop) for file in files]
    if not results.of("exact"):
        products = dict(exact_products(gradients, ranges))
        results.add({"exact": {name: value.tolist() for name, value in products.items()}})
        note("exact inner products: done")
    sketches: dict[tuple[int, int], list[Tensor]] = {pair: [] for pair in wanted}
    for dataset, gradient in zip(datasets, gradients, strict=True):
        for proj_dim, seed in wanted:
            sketches[proj_dim, seed].append(
                sketch_gradient(gradient, ranges, CountSketch(proj_dim, seed))
            )
        note(f"sketches of {dataset.name}: done")
    for (proj_dim, seed), rows in sketches.items():
        stacked = torch.stack(rows).double()
        entry = {"proj_dim": proj_dim, "seed": seed, "products": (stacked @ stacked.T).tolist()}
        results.add({"sketch": entry})


def report(results: Results, proj_dims: Sequence[int]) -> str:
    """Tables of the cosines' errors over all pairs and seeds, in units of 1/sqrt(D)."""
    exact = sum(
        torch.tensor(value, dtype=torch.float64) for value in results.of("exact")[0].values()
    )
    assert isinstance(exact, Tensor)
    truth = cosines(exact)
    rows, columns = torch.triu_indices(len(truth), len(truth), offset=1)
    c = truth[rows, columns]
    lines = [
        f"{len(exact)} tasks, {len(c)} pairs; "
        f"exact cosines {c.min():.3f} to {c.max():.3f}, mean {c.mean():.3f}.",
        "",
        "| D | seeds | rms error (each seed) | <= 2.5 | worst pair | rms / theory | "
        "inner products: rms / theory |",
        "|---|---|---|---|---|---|---|",
    ]
    goals = ["", "| goal | measured | must | |", "|---|---|---|---|"]
    for proj_dim in proj_dims:
        entries = [entry for entry in results.of("sketch") if entry["proj_dim"] == proj_dim]
        # [seeds, N, N]
        products = torch.tensor([entry["products"] for entry in entries], dtype=torch.float64)
        sketched = torch.stack([cosines(of_seed) for of_seed in products])
        error = proj_dim**0.5 * (sketched[:, rows, columns] - c)
        norms = exact.diagonal().sqrt()
        relative = (products - exact) / norms / norms.unsqueeze(1)
        inner = proj_dim**0.5 * relative[:, rows, columns]
        each = error.square().mean(1).sqrt()
        rms = float(error.square().mean().sqrt())
        within = float((error.abs() <= 2.5).double().mean())
        worst = float(error.abs().max())
        # To first order in the norms' errors.
        by_theory = float((error / (1 - c**2)).square().mean().sqrt())
        inner_by_theory = float((inner / (1 + c**2).sqrt()).square().mean().sqrt())
        lines.append(
            f"| {proj_dim} | {len(error)} | {rms:.3f} ({each.min():.2f}–{each.max():.2f}) | "
            f"{within:.1%} | {worst:.2f} | {by_theory:.3f} | {inner_by_theory:.3f} |"
        )
        goals += [_goal(f"rms error, D = {proj_dim}", rms, "<= 1.1", rms <= 1.1)]
        quantile = float(error.abs().quantile(0.95))
        goals += [_goal(f"95 % quantile, D = {proj_dim}", quantile, "<= 2.5", within >= 0.95)]
    return "\n".join([*lines, *goals, "", *_shares(results.of("exact")[0], exact)])


def _goal(name: str, value: float, must: str, reached: bool) -> str:
    return f"| {name} | {value:.3f} / sqrt(D) | {must} | {'reached' if reached else '**missed**'} |"


def _shares(products: dict[str, Any], exact: Tensor) -> list[str]:
    """Lines of the ten parameters with the largest share of the squared norm, mean over tasks."""
    shares = {
        name: float((torch.tensor(value).diagonal() / exact.diagonal()).mean())
        for name, value in products.items()
    }
    largest = sorted(shares.items(), key=lambda item: -item[1])[:10]
    return [
        "| parameter | share of the squared norm |",
        "|---|---|",
        *(f"| {n} | {share:.3f} |" for n, share in largest),
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--examples", type=int, default=16, help="per task")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument(
        "--proj-dims", type=lambda text: [int(n) for n in text.split(",")], default=[16384, 65536]
    )
    parser.add_argument("--model", type=Path, help="a model directory in place of SmolLM2-135M")
    parser.add_argument("--quick", action="store_true", help="the demo's 8 quick tasks")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    model = arguments.model or prepare_model(default_cache())
    data = load_tasks(arguments.directory, model, arguments.quick)
    circumstances: dict[str, Any] = {
        "hash_version": HASH_VERSION,
        "model": model_fingerprint(model),
        "examples": arguments.examples,
        "tasks": [dataset.name for dataset in data[0]],
    }
    results = Results(arguments.directory / "sketch_accuracy.jsonl", circumstances)
    measure(arguments, model, results, data)
    print(report(results, arguments.proj_dims))


if __name__ == "__main__":
    main()
