"""Linear + cross-entropy, forward and backward, against PyTorch's ways: time and memory.

    python -m bench.train.cross_entropy [--json FILE] [--quick]

Timed in one process, in turns: ours, eager F.cross_entropy(hidden @ weight.T), the same under
torch.compile, and the three matrix products by themselves. F.linear_cross_entropy may take minutes
a
step: it runs in a process of its own that is stopped after --cap seconds. Memory is a fresh
process's peak over its inputs, after one step with a tiny head that loads the libraries. Results
are compared before anything is timed. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.support.dtypes import DTYPES
from bench.support.measure import machine, spread
from merit_fast.kernels.cross_entropy import linear_cross_entropy

IGNORED_EVERY = 4
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels).loss


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels)


def torch_linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, labels)  # torch 2.13 and newer


LOSSES: dict[str, Loss] = {"ours": ours, "eager": eager, "F.linear_cross_entropy": torch_linear}


def inputs(tokens: int, width: int, vocabulary: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(DTYPES[dtype]).requires_grad_()
    weight = (torch.randn(vocabulary, width) * 0.02).to(DTYPES[dtype]).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[::IGNORED_EVERY] = -100
    return hidden, weight, labels


def step(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    hidden.grad = weight.grad = None
    value = loss(hidden, weight, labels)
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach()


def products(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    hidden = hidden.detach()
    weight = weight.detach()
    logits = hidden @ weight.T
    logits @ weight
    logits.T @ hidden


def status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def child(name: str, shape: tuple[int, int, int], dtype: str) -> None:
    """Takes one step in this process; prints its seconds, and its MiB over the inputs."""
    step(LOSSES[name], *inputs(64, shape[1], 64, dtype))
    batch = inputs(*shape, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # starts a new peak
    before = status_mib("VmRSS")
    start = time.perf_counter()
    step(LOSSES[name], *batch)
    print(
        json.dumps(
            {"seconds": time.perf_counter() - start, "peak_mib": status_mib("VmHWM") - before}
        )
    )


def in_child(
    name: str, shape: tuple[int, int, int], dtype: str, cap: float
) -> dict[str, float] | None:
    """Seconds and peak MiB of a step in a process of its own; None if it was stopped."""
    command = [sys.executable, "-m", "bench.train.cross_entropy", "--child", name, "--dtype", dtype]
    sizes = ["--tokens", str(shape[0]), "--width", str(shape[1]), "--vocabulary", str(shape[2])]
    try:
        done = subprocess.run([*command, *sizes], capture_output=True, text=True, timeout=cap)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
    figures: dict[str, float] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return figures


def check(shape: tuple[int, int, int], dtype: str) -> None:
    """Checks on a small vocabulary that no gradient is further from float64 than eager's + 1e-5."""
    batch = inputs(min(shape[0], 64), shape[1], min(shape[2], 5000), dtype)
    doubles = (*(tensor.detach().double().requires_grad_() for tensor in batch[:2]), batch[2])
    step(lambda h, w, y: F.cross_entropy(h @ w.T, y), *doubles)
    truth = [tensor.grad for tensor in doubles[:2] if tensor.grad is not None]
    errors = {}
    for name in ("ours", "eager"):
        step(LOSSES[name], *batch)
        gradients = [tensor.grad for tensor in batch[:2] if tensor.grad is not None]
        errors[name] = max(
            float((a.double() - b).norm() / b.norm()) for a, b in zip(gradients, truth, strict=True)
        )
    if not errors["ours"] <= errors["eager"] + 1e-5:
        raise SystemExit(
            f"wrong: relative error {errors['ours']:.1e}, eager has {errors['eager']:.1e}"
        )


def timed(
    shape: tuple[int, int, int], dtype: str, seconds: float, compiled: bool
) -> dict[str, dict[str, float]]:
    """Medians and quartile ranges of wall and CPU seconds.

    The ways take turns until ``seconds`` are over, 3 turns at least.
    """
    batch = inputs(*shape, dtype)
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: step(ours, *batch),
        "eager": lambda: step(eager, *batch),
        "products": lambda: products(*batch),
    }
    if compiled:
        of_compiler = torch.compile(eager, dynamic=False)
        runs["torch.compile"] = lambda: step(of_compiler, *batch)
        runs["torch.compile"]()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while len(times["ours"]) < 3 or time.perf_counter() < end:
        for name, run in runs.items():
            wall = time.perf_counter()
            cpu = time.process_time()
            run()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    rows = {}
    for name, pairs in times.items():
        wall, wall_range = spread([pair[0] for pair in pairs])
        cpu, cpu_range = spread([pair[1] for pair in pairs])
        rows[name] = {
            "wall_s": wall,
            "wall_range_s": wall_range,
            "cpu_s": cpu,
            "cpu_range_s": cpu_range,
        }
    return rows


def measure(shape: tuple[int, int, int], dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    check(shape, dtype)
    rows: dict[str, dict[str, Any]] = timed(shape, dtype, options.seconds, not options.no_compile)
    for name in ("ours", "eager"):
        rows[name]["peak_mib"] = (in_child(name, shape, dtype, 600) or {})["peak_mib"]
    if hasattr(F, "linear_cross_entropy"):
        figures = in_child("F.linear_cross_entropy", shape, dtype, options.cap)
        if figures is None:
            rows["F.linear_cross_entropy"] = {"stopped_s": options.cap}
        else:
            rows["F.linear_cross_entropy"] = {
                "wall_s": figures["seconds"],
                "peak_mib": figures["peak_mib"],
            }
    head_mib = shape[1] * shape[2] * DTYPES[dtype].itemsize / 2**20
    return {
        "tokens": shape[0],
        "width": shape[1],
        "vocabulary": shape[2],
        "dtype": dtype,
        "dw_mib": head_mib,
    } | {"rows": rows}


def print_size(size: dict[str, Any]) -> None:
    """Prints the rows of one size as a table."""
    rows = size["rows"]
    sizes = f"N={size['tokens']} H={size['width']} V={size['vocabulary']}"
    print(f"\n{size['dtype']}, {sizes}, dW {size['dw_mib']:.0f} MiB")
    heads = f"{'wall s':>9}{'(range)':>9}{'CPU s':>8}{'x eager':>9}{'x products':>12}"
    print(f"{'':24}{heads}{'peak MiB':>10}")
    for name, row in rows.items():
        if "stopped_s" in row:
            limit = f"{row['stopped_s']:.0f} s"
            print(f"{name:24}  one step, with the start of its process, took more than {limit}")
            continue
        ratios = [row["wall_s"] / rows[of]["wall_s"] for of in ("eager", "products")]
        cells = [f"{row['wall_s']:9.3f}", f"{row.get('wall_range_s', float('nan')):9.3f}"]
        cells += [
            f"{row.get('cpu_s', float('nan')):8.3f}",
            f"{ratios[0]:9.2f}",
            f"{ratios[1]:12.2f}",
        ]
        if "peak_mib" in row:
            cells.append(f"{row['peak_mib']:10.0f}")
        print(f"{name:24}{''.join(cells)}")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train.cross_entropy", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=10.0, help="for the turns of one size")
    parser.add_argument(
        "--cap", type=float, default=30.0, help="after which F.linear_cross_entropy is stopped"
    )
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--quick", action="store_true", help="a small head, few turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the last line to FILE too")
    parser.add_argument("--child", choices=LOSSES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens = [64, 512]
        options.width = 256
        options.vocabulary = 16384
        options.seconds = 1.0
        options.cap = 10.0
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.child:
        child(
            options.child, (options.tokens[0], options.width, options.vocabulary), options.dtype[0]
        )
        return 0
    report: dict[str, Any] = {
        "machine": machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    report |= {"sizes": [], "not_measured": []}
    for dtype in options.dtype:
        if dtype == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            reason = "torch has no fast bf16 product on this CPU: one product would take minutes"
            print(f"\nbf16 was NOT MEASURED: {reason}")
            report["not_measured"].append({"dtype": dtype, "reason": reason})
            continue
        for tokens in options.tokens:
            report["sizes"].append(
                measure((tokens, options.width, options.vocabulary), dtype, options)
            )
            print_size(report["sizes"][-1])
    line = json.dumps(report)
    if options.json:
        options.json.write_text(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
