"""CPU time of single calls of the sketch's kernels, to compare two trees.

    python -m bench.compare --base REF --build --figure NAME -- \\
        python $PWD/bench/sketch/calls.py --only NAME [--threads 2]

Prints the median CPU milliseconds of every call, all threads together, and last the same as JSON.
With OMP_THREAD_LIMIT=1 one thread does the work of all, so that none spins while it waits: a fair
count of work on a busy machine. It needs nothing of its tree but the public functions.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from merit_fast.kernels.sketch import (
    CountSketch,
    embedding_grad_sketch,
    flat_sketch,
    linear_grad_sketch,
    vector_grad_sketch,
)

SKETCH = CountSketch(65536)
LINEAR = [
    (8, 128, 1408, 512),
    (8, 512, 1408, 512),
    (8, 128, 512, 512),
    (8, 48, 1536, 576),
    (8, 24, 576, 576),
    (16, 1, 576, 576),
    (1, 128, 576, 576),
    (1, 512, 2048, 2048),
]
Call = Callable[[], object]


def calls() -> Iterator[tuple[str, Callable[[], Call]]]:
    """Names, and functions that make the inputs and return the call."""
    for dtype in (torch.float32, torch.bfloat16):
        kind = "fp32" if dtype == torch.float32 else "bf16"
        for batch, tokens, rows, columns in LINEAR:
            make = functools.partial(linear, batch, tokens, rows, columns, dtype)
            yield f"linear {batch}x{tokens} {rows}x{columns} {kind}", make
        for batch, tokens, width in ((8, 128, 576), (1, 512, 2048)):
            place = f"{batch}x{tokens}x{width} {kind}"
            yield f"embedding {place}", functools.partial(embedding, batch, tokens, width, dtype)
            yield f"vector {place}", functools.partial(vector, batch, tokens, width, dtype)
        for batch, rows, columns in ((1, 4096, 1024), (8, 576, 576)):
            make = functools.partial(flat, batch, rows, columns, dtype)
            yield f"flat {batch}x{rows}x{columns} {kind}", make


def linear(batch: int, tokens: int, rows: int, columns: int, dtype: torch.dtype) -> Call:
    dy = torch.randn(batch, tokens, rows).to(dtype)
    x = torch.randn(batch, tokens, columns).to(dtype)
    out = torch.zeros(batch, SKETCH.proj_dim)
    return lambda: linear_grad_sketch(dy, x, "w", SKETCH, out=out)


def embedding(batch: int, tokens: int, width: int, dtype: torch.dtype) -> Call:
    dy = torch.randn(batch, tokens, width).to(dtype)
    ids = torch.randint(0, 49152, (batch, tokens))
    out = torch.zeros(batch, SKETCH.proj_dim)
    return lambda: embedding_grad_sketch(dy, ids, "w", SKETCH, out=out)


def vector(batch: int, tokens: int, width: int, dtype: torch.dtype) -> Call:
    dy = torch.randn(batch, tokens, width).to(dtype)
    out = torch.zeros(batch, SKETCH.proj_dim)
    return lambda: vector_grad_sketch(dy, "w", SKETCH, x=dy, out=out)


def flat(batch: int, rows: int, columns: int, dtype: torch.dtype) -> Call:
    gradient = torch.randn(batch, rows, columns).to(dtype)
    out = torch.zeros(batch, SKETCH.proj_dim)
    return lambda: flat_sketch(gradient, "w", SKETCH, out=out)


def cpu_milliseconds(call: Call, seconds: float) -> float:
    """Median over as many calls as take ``seconds``, and three at least; the first is not timed."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < 1000 * seconds:
        start = time.process_time()
        call()
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="calls whose name contains this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU seconds a call")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures: dict[str, float] = {}
    for name, make in calls():
        if arguments.only in name:
            figures[name] = cpu_milliseconds(make(), arguments.seconds)
            print(f"{name:32} {figures[name]:9.3f} ms", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
