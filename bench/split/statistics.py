"""Time and memory of a split's statistics from sketch states on disk.

Products of block sums, Gram, cosines and their errors.

    python -m bench.split.statistics [--datasets 176] [--blocks 8] [--proj-dim 65536] [--repeats 3]
    [--directory DIR]

Every repeat is a process of its own, once with NumPy's BLAS on one thread and once on all cores: it
reads the states (in the page cache) and measures after that, imports not counted; its peak memory
counts everything, mapped files too. CPU seconds tell less of a busy machine than
wall seconds do, but BLAS threads that wait for each other burn them. Two floors from the same
process: the same number of products with nothing between them, and a sum over the bytes. The last
line is one JSON object. Goal: 2 s and 1 GiB on two cores.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.support.measure import machine, run_child, spread
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.sketch_state import SketchIdentity, SketchState
from merit_fast.split.conflict import conflict_of
from merit_fast.split.moments import block_products

GOAL_S = 2.0
GOAL_MIB = 1024.0


def write_states(directory: Path, datasets: int, blocks: int, proj_dim: int) -> None:
    """Writes states of 200 examples each, a common direction plus noise; keeps existing files."""
    identity = SketchIdentity(CountSketch(proj_dim), "bench", ("w",))
    for i in range(datasets):
        file = directory / f"{i:04}.safetensors"
        if file.exists():
            continue
        generator = torch.Generator().manual_seed(i % 7)
        noise = torch.Generator().manual_seed(1000 + i)
        state = SketchState.zeros(identity, blocks)
        state.block_counts += 200 // blocks
        state.block_weights += 200 // blocks
        state.block_sums += 25 * torch.randn(proj_dim, generator=generator, dtype=torch.float64)
        state.block_sums += 45 * torch.randn(blocks, proj_dim, generator=noise, dtype=torch.float64)
        file.write_bytes(state.to_bytes())


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def median(runs: list[dict[str, Any]], key: str) -> float:
    return round(spread([run[key] for run in runs])[0], 4)


def child(directory: Path) -> dict[str, float]:
    """Measures one process, in seconds."""
    files = sorted(directory.glob("*.safetensors"))
    open_s, states = timed(lambda: [SketchState.read(file) for file in files])
    counts = np.stack([state.block_counts.numpy() for state in states])
    sums = [state.block_sums.numpy() for state in states]
    cpu = time.process_time()
    products_s, products = timed(lambda: block_products(sums, counts))
    products_cpu_s = time.process_time() - cpu
    conflict_s, conflict = timed(lambda: conflict_of(products, debias="blocks"))
    assert conflict.resolved.all() and np.isfinite(conflict.cosine).all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    datasets = len(sums)
    (blocks, width) = sums[0].shape
    rows = np.ones((datasets, 4096))
    rows @ rows.T
    product_s = min(timed(lambda: rows @ rows.T)[0] for _ in range(20))
    read_s, _ = timed(lambda: [np.add.reduce(array, axis=None) for array in sums])
    return {
        "seconds": open_s + products_s + conflict_s,
        "open_s": open_s,
        "products_s": products_s,
        "products_cpu_s": products_cpu_s,
        "conflict_s": conflict_s,
        "floor_products_s": product_s * (blocks + 3) * width / 4096,
        "floor_read_s": read_s,
        "peak_before_floors_mib": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", type=int, default=176)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--proj-dim", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="keep the states here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = (arguments.directory or Path(scratch)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        write_states(directory, arguments.datasets, arguments.blocks, arguments.proj_dim)
        command = [sys.executable, "-m", "bench.split.statistics", "--child", directory]
        runs: dict[int, list[dict[str, Any]]] = {1: [], machine()["cores"]: []}
        for _ in range(arguments.repeats):  # in turn, so that a busy minute meets all
            for threads, of_threads in runs.items():
                count = str(threads)
                of_threads.append(
                    run_child(command, {"OPENBLAS_NUM_THREADS": count, "MKL_NUM_THREADS": count})
                )
    failed = [run["error"] for of_threads in runs.values() for run in of_threads if "error" in run]
    if failed:
        sys.exit(failed[0])
    figures = {
        str(threads): {key: median(of_threads, key) for key in of_threads[0]}
        for threads, of_threads in runs.items()
    }
    print(f"{'BLAS threads':24}" + "".join(f"{threads:>10}" for threads in figures))
    for key in next(iter(figures.values())):
        print(f"{key:24}" + "".join(f"{values[key]:>10.3f}" for values in figures.values()))
    best = min(figures.values(), key=lambda values: values["seconds"])
    reached = best["seconds"] < GOAL_S and best["peak_mib"] < GOAL_MIB
    shape = {key: getattr(arguments, key) for key in ("datasets", "blocks", "proj_dim", "repeats")}
    print(json.dumps({**shape, "threads": figures, "goal": reached, "machine": machine()}))


if __name__ == "__main__":
    main()
