"""Checks and times every op on this machine's GPU: python -m bench.gpu [--json FILE]

Each backend but eager is compared with float64 on odd and on large sizes, in fp32 and bf16. Right
results are timed on the large ones, next to eager PyTorch, torch.compile, liger-kernel where it has
a counterpart, and the copies and products that the GPU itself reaches. The exit code is 1 if a
result is wrong or nothing could be checked. Without a GPU the script reports that and exits with 0.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.average import AVERAGE
from bench.gpu.cases import Case, Op
from bench.gpu.cross_entropy import CROSS_ENTROPY, STATISTICS
from bench.gpu.layers import LAYERS
from bench.gpu.optimizer import ADAMW
from bench.gpu.search import SEARCH
from bench.gpu.sketch import SKETCHES
from bench.support.dtypes import DTYPES
from merit_fast.errors import one_line
from merit_fast.kernels import dispatch

OPS = [AVERAGE, *SKETCHES, CROSS_ENTROPY, STATISTICS, *LAYERS, ADAMW, SEARCH]
BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}
# What a backend's error may exceed that of eager on the same device by, relative: the order of
# float32 sums.
FLOOR = 2e-6
GIB = 1 << 30

Row = dict[str, Any]
Timer = Callable[[Callable[[], Any]], float]  # seconds of a call


def errors(results: Sequence[Tensor], truth: Sequence[Tensor]) -> tuple[float, float]:
    """|result - truth| / |truth| over all tensors, in the 2-norm and in the largest entry."""
    ours = torch.cat([tensor.double().flatten() for tensor in results])
    exact = torch.cat([tensor.flatten() for tensor in truth])

    def relative(norm: float) -> float:
        distance = torch.linalg.vector_norm(ours - exact, norm)
        return float(distance / torch.linalg.vector_norm(exact, norm))

    return relative(2), relative(float("inf"))


def check(
    op: Op, case: Case, backend: str, truth: Sequence[Tensor], eager: tuple[float, float]
) -> Row:
    """Compares one backend with the truth; ``wrong`` is None or names the fault in one line."""
    row: Row = {
        "op": op.name,
        "case": case.name,
        "dtype": case.dtype,
        "backend": backend,
        "wrong": None,
    }
    try:
        results = [tensor.clone() for tensor in case.run(backend)]
        again = case.run(backend)
    except Exception as error:
        return {**row, "wrong": f"{type(error).__name__}: {one_line(error)}"}
    row["error"] = errors(results, truth)
    row["eager_error"] = eager
    worst = max(range(2), key=lambda norm: row["error"][norm] - eager[norm])
    if not row["error"][worst] <= eager[worst] + FLOOR:  # also where it is NaN
        row["wrong"] = f"relative error {row['error'][worst]:.1e}, eager has {eager[worst]:.1e}"
    elif not all(torch.equal(a, b) for a, b in zip(results, again, strict=True)):
        row["wrong"] = "two runs gave different bits"
    return row


def time_case(
    op: Op, case: Case, backends: Sequence[str], timer: Timer, ceilings: dict[str, float]
) -> Iterator[Row]:
    """Times the op's backends and peers; the floor is the GPU's time for the same work."""
    rate = ceilings[f"{case.dtype}_operations_per_s"]
    floor = max(case.moved_bytes / ceilings["bytes_per_s"], case.operations / rate)
    runs = {backend: (lambda backend=backend: case.run(backend)) for backend in backends}
    for name, run in {**runs, **case.peers}.items():
        row: Row = {
            "op": op.name,
            "case": case.name,
            "dtype": case.dtype,
            "by": name,
            "floor_s": floor,
        }
        try:
            run()  # compiles before the clock starts
            row["seconds"] = timer(run)
        except Exception as error:  # a failing peer or full memory must not end the other timings
            row["failed"] = f"{type(error).__name__}: {one_line(error)}"
        yield row


def measure_ceilings(
    device: torch.device, timer: Timer, size: int = GIB, side: int = 8192
) -> dict[str, float]:
    """Bytes per second of a copy (read and written), operations per second of a matrix product."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    ceilings = {"bytes_per_s": 2 * size / timer(lambda: target.copy_(source))}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        ceilings[f"{name}_operations_per_s"] = 2 * side**3 / timer(functools.partial(a.matmul, b))
    return ceilings


def run(
    device: torch.device, timer: Timer | None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Checks all of OPS, times them if there is a timer. Wrong results are not timed."""
    torch.manual_seed(0)
    report: dict[str, Any] = {"checks": [], "not_run": [], "times": []}
    report["ceilings"] = ceilings = measure_ceilings(device, timer) if timer else {}
    for op in OPS:
        backends = []
        for backend in BACKENDS[device.type]:
            if backend not in dispatch.OPS[op.row]:
                continue
            if reason := dispatch.unavailable(op.row, backend, device.type):
                report["not_run"].append({"op": op.name, "backend": backend, "reason": reason})
                say(f"NOT RUN {op.name}: backend {backend} {reason}")
            else:
                backends.append(backend)
        for make in (op.small, op.large) if timer else (op.small,):
            for case in make(device) if backends else ():
                right = _check_all(op, case, backends, report, say)
                if timer and make is op.large:
                    report["times"] += time_case(op, case, right, timer, ceilings)
    return report


def _check_all(
    op: Op, case: Case, backends: Sequence[str], report: dict[str, Any], say: Callable[[str], None]
) -> list[str]:
    """Checks every backend and returns the right ones."""
    truth = case.truth()
    eager = errors(case.run("eager"), truth)
    rows = [check(op, case, backend, truth, eager) for backend in backends]
    report["checks"] += rows
    for row in rows:
        if row["wrong"]:
            say(f"WRONG {op.name}, {case.name}, {case.dtype}, {row['backend']}: {row['wrong']}")
    return [row["backend"] for row in rows if not row["wrong"]]


def exit_code(report: dict[str, Any]) -> int:
    """1 if nothing was checked or a result is wrong, else 0."""
    return 1 if not report["checks"] or any(row["wrong"] for row in report["checks"]) else 0


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of tables."""
    head = f"{'op':25}{'backend':9}{'cases':>6}{'wrong':>6}{'error':>9}{'of eager':>9}"
    yield f"{head}  largest relative error"
    for name, backend in dict.fromkeys((row["op"], row["backend"]) for row in report["checks"]):
        rows = [row for row in report["checks"] if (row["op"], row["backend"]) == (name, backend)]
        right = [row for row in rows if not row["wrong"]]
        worst = [
            max((row[key][0] for row in right), default=0.0) for key in ("error", "eager_error")
        ]
        counts = f"{len(rows):6}{len(rows) - len(right):6}"
        yield f"{name:25}{backend:9}{counts}{worst[0]:9.1e}{worst[1]:9.1e}"
    if not report["times"]:
        return
    rates = report["ceilings"]
    yield ""
    yield "measured ceilings: " + ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
    yield f"{'op':25}{'case':34}{'dtype':6}{'by':16}{'ms':>9}{'of the ceiling':>16}"
    for row in report["times"]:
        end = f"  {row['failed']}" if "failed" in row else ""
        if "seconds" in row:
            end = f"{1e3 * row['seconds']:9.3f}{row['floor_s'] / row['seconds']:16.0%}"
        yield f"{row['op']:25}{row['case']:34}{row['dtype']:6}{row['by']:16}{end}"
    if not any(row["by"] == "liger-kernel" for row in report["times"]):
        yield "liger-kernel, which has counterparts of the layers, is not installed: not timed"


def gpu_timer() -> Timer:
    """A timer of the median seconds of many calls."""
    from triton.testing import do_bench

    return lambda run: do_bench(run, return_mode="median") / 1e3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    file = parser.parse_args(arguments).json
    if not torch.cuda.is_available():
        print("bench.gpu: no GPU here: nothing was checked, nothing was timed, nothing is claimed")
        return 0
    from merit_fast.cli.doctor import diagnose

    report = {**diagnose(), **run(torch.device("cuda"), gpu_timer())}
    print(report["device"], *report_lines(report), sep="\n")
    if file:
        file.write_text(json.dumps(report, indent=1) + "\n")
    return exit_code(report)


if __name__ == "__main__":
    raise SystemExit(main())
