"""Search by brute force: the 100 stored rows nearest to one target, against reading the rows once.

    python -m bench.search.rows [--rows 100000] [--width 8192] [--threads 1,2] [--rounds 7]

The rows are float16 in memory (1.6 GB by default). Every way runs once a round, and each round
starts with the next; the table has medians over the rounds, and the median of each round's ratio to
the floor, a sum over the same bytes as int64. Results are compared before anything is timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.support.measure import machine
from merit_fast.kernels.search import row_products

TOP = 100
FLOOR = "read floor: sum of the bytes as int64"
OURS = "row_products, one target"
CHUNK = 512  # rows that NumPy and eager hold in float32 at a time
FEW = 1000  # rows that are compared with float64
Way = Callable[[], Tensor]


def stored_rows(count: int, width: int) -> Tensor:
    """Random rows [count, width] in float16."""
    rows = torch.empty(count, width, dtype=torch.float16)
    generator = torch.Generator().manual_seed(0)
    for first in range(0, count, CHUNK):
        rows[first : first + CHUNK].normal_(generator=generator)
    return rows


def by_numpy(rows: Tensor, vector: Tensor) -> Tensor:
    array = rows.numpy()
    factor = vector.numpy()
    parts = [
        array[first : first + CHUNK].astype(np.float32) @ factor
        for first in range(0, len(array), CHUNK)
    ]
    return torch.from_numpy(np.concatenate(parts))


def ways(rows: Tensor, vectors: Tensor) -> dict[str, Way]:
    """The functions to time, by name. All but the floor return products with the first vector."""
    one = vectors[:1]
    narrow = one[0].half()
    as_int64 = rows.view(torch.int64)
    return {
        FLOOR: as_int64.sum,
        OURS: lambda: row_products(rows, one)[:, 0],
        f"row_products, {len(vectors)} targets at once": lambda: row_products(rows, vectors)[:, 0],
        "eager: float32 in chunks": lambda: row_products(rows, one, backend="eager")[:, 0],
        "torch.mv in float16": lambda: torch.mv(rows, narrow),
        "NumPy: float32 in chunks": lambda: by_numpy(rows, one[0]),
    }


def check(name: str, way: Way, rows: Tensor, vector: Tensor) -> None:
    """Ends the run where products are not those of float64; those of float16 may lose 1 %."""
    truth = rows[:FEW].double() @ vector.double()
    error = float((way()[:FEW].double() - truth).norm() / truth.norm())
    if not error < (1e-2 if "float16" in name else 1e-5):
        raise SystemExit(f"{name}: products are off by {error:.1e}")


def measure(timed: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, products and the choice of the largest 100 together."""
    names = list(timed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            begin = time.perf_counter()
            products = timed[name]()
            if name != FLOOR:
                products.topk(min(TOP, len(products)))
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def table(seconds: dict[str, list[float]], threads: int, size: int) -> list[str]:
    lines = [f"| {threads} thread(s) | ms | GB/s | of the floor |", "|---|---|---|---|"]
    for name, values in seconds.items():
        middle = statistics.median(values)
        pairs = zip(values, seconds[FLOOR], strict=True)
        ratio = statistics.median(value / floor for value, floor in pairs)
        lines.append(f"| {name} | {1e3 * middle:.0f} | {size / middle / 1e9:.1f} | {ratio:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--vectors", type=int, default=9)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write every second to this file")
    arguments = parser.parse_args()
    rows = stored_rows(arguments.rows, arguments.width)
    vectors = torch.randn(arguments.vectors, arguments.width)
    timed = ways(rows, vectors)
    for name, way in timed.items():
        if name != FLOOR:
            check(name, way, rows, vectors[0])
    print(machine())
    record = {}
    for threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(threads)
        record[threads] = measure(timed, arguments.rounds)
        print("", *table(record[threads], threads, rows.nbytes), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "seconds": record}) + "\n")


if __name__ == "__main__":
    main()
