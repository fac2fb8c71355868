"""Distance of sketched cosines of real gradients from the exact ones.

SmolLM2-135M, the demo's tasks, all parameters.

    python -m bench.sketch.accuracy DIR [--examples 16] [--seeds 8] [--proj-dims 16384,65536]
    [--model PATH] [--quick]

A task's gradient is that of the mean of its examples' losses: fp32 weights, one ordinary backward
pass, kept in DIR as a memory-mapped file (0.54 GB a task, 15 GB for all 28). Exact inner products
are sums in fp64 over these files; the sketches are those of ``flat_sketch``. Finished results are
kept: more seeds later cost only these seeds. The report has a table in units of 1/sqrt(D), its
goals, the errors of every fifth entry in place of a sketch, as MERIT publishes it, and the
parameters with the largest share of the gradients' squared norm.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.sketch.accuracy.gradients import (
    STRIDE,
    exact_products,
    load_tasks,
    mapped,
    ranges_of,
    sketch_gradient,
    strided_products,
    write_gradient,
)
from bench.sketch.accuracy.report import report
from bench.support.measure import Results
from merit_fast.data import Dataset
from merit_fast.demo import default_cache, prepare_model
from merit_fast.kernels.sketch import HASH_VERSION, CountSketch
from merit_fast.model import load_model, model_fingerprint


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
    offsets = sorted(set(range(STRIDE)) - {entry["offset"] for entry in results.of("strided")})
    if not wanted and not offsets and results.of("exact"):
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
    for offset in offsets:
        kept = strided_products(gradients, offset)
        floats = len(range(offset, ranges[-1].stop, STRIDE))
        entry = {"offset": offset, "floats": floats, "products": kept.tolist()}
        results.add({"strided": entry})
        note(f"every fifth entry from {offset} on: done")
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
