"""AdamW in one pass against torch's.

    python -m bench.train.optimizer [--rounds 9] [--threads 2] [--layers 3] [--deepspeed PYTHON]

38 tensors of the shapes of Qwen2-0.5B's layers, 48.4 million parameters. Every variant steps once a
round, each round begins with the next variant, and ratios are those of a round; medians count. The
floor is the traffic that every way of computing has, at the rate of an in-place ``mul_`` of the
same round. Results are compared before anything is timed.

On a busy machine set OMP_WAIT_POLICY=passive: torch forks threads once a tensor, and waiting for a
thread that is not scheduled counts as wall and CPU time. This made torch's fused step look 2.8 to
6 times slower than it is.

``--deepspeed PYTHON`` names the Python of an environment that holds DeepSpeed and this package, and
runs only ``bench.train.deepspeed_adam`` there.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.support.measure import machine, spread
from merit_fast.kernels.optimizer import FusedAdamW

HIDDEN = 896
INTERMEDIATE = 4864
KEYS = 128
LAYER = [
    (HIDDEN, HIDDEN), (HIDDEN,), (KEYS, HIDDEN), (KEYS,), (KEYS, HIDDEN), (KEYS,), (HIDDEN, HIDDEN),
    (INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE), (HIDDEN,), (HIDDEN,),
]  # fmt: skip
EXTRA = [(HIDDEN,), (2 * HIDDEN, 2 * HIDDEN)]
SETTINGS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
FP32 = torch.float32
BF16 = torch.bfloat16


class Variant:
    """Weights of its own, an optimizer on them and one step of it; ``floor_bytes`` an element."""

    def __init__(
        self,
        layers: int,
        dtype: torch.dtype,
        floor_bytes: float,
        make: Callable[[list[Tensor]], Any],
        sequence: bool = False,
    ) -> None:
        torch.manual_seed(0)
        shapes = LAYER * layers + EXTRA
        self.weights: list[Tensor] = [
            torch.nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in shapes
        ]
        for weight in self.weights:
            weight.grad = (torch.randn(weight.shape) * 1e-3).to(dtype)
        self.elements = sum(weight.numel() for weight in self.weights)
        self.optimizer = make(self.weights)
        self.averages = [weight.detach().clone() for weight in self.weights] if sequence else []
        self.floor_bytes = floor_bytes

    def step(self) -> None:
        if not self.averages:
            self.optimizer.step()
            return
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0, foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, [weight.detach() for weight in self.weights], 1e-3)
        torch._foreach_zero_([weight.grad for weight in self.weights if weight.grad is not None])


def torchs(**options: Any) -> Callable[[list[Tensor]], Any]:
    return lambda weights: torch.optim.AdamW(weights, **SETTINGS, **options)


def ours(**options: Any) -> Callable[[list[Tensor]], Any]:
    return lambda weights: FusedAdamW(weights, **SETTINGS, **options)


ALL = {"max_norm": 1.0, "average_decay": 0.999, "zero_grad": True}
# name -> dtype of weights, bytes per element that must move (read and written), optimizer, and
# whether torch's separate passes follow
VARIANTS: dict[str, tuple[torch.dtype, float, Callable[[list[Tensor]], Any], bool]] = {
    "fp32: torch for-loop": (FP32, 28, torchs(foreach=False), False),
    "fp32: torch foreach": (FP32, 28, torchs(foreach=True), False),
    "fp32: torch fused": (FP32, 28, torchs(fused=True), False),
    "fp32: ours": (FP32, 28, ours(), False),
    "fp32: ours, 8-bit moments": (FP32, 16.06, ours(moments="int8"), False),
    "bf16: torch fused, nearest": (BF16, 14, torchs(fused=True), False),
    "bf16: ours, bf16 moments, stochastic": (BF16, 14, ours(moments="bf16"), False),
    "bf16: ours, fp32 moments, stochastic": (BF16, 22, ours(), False),
    "bf16: ours, 8-bit moments, stochastic": (BF16, 10.06, ours(moments="int8"), False),
    "bf16: ours, fp32 master": (BF16, 28, ours(master="fp32"), False),
    "bf16: ours, split master": (BF16, 26, ours(master="split"), False),
    "bf16: ours, split8, 8-bit moments": (
        BF16,
        12.06,
        ours(master="split8", moments="int8"),
        False,
    ),
    "fp32 all: torch clip, fused, lerp, zero": (FP32, 44, torchs(fused=True), True),
    "fp32 all: ours in one pass": (FP32, 44, ours(**ALL), False),
}
RATIOS = [
    ("fp32: torch for-loop", "fp32: ours"),
    ("fp32: torch foreach", "fp32: ours"),
    ("fp32: torch fused", "fp32: ours"),
    ("fp32: torch fused", "fp32: ours, 8-bit moments"),
    ("bf16: torch fused, nearest", "bf16: ours, bf16 moments, stochastic"),
    ("bf16: torch fused, nearest", "bf16: ours, fp32 moments, stochastic"),
    ("bf16: torch fused, nearest", "bf16: ours, 8-bit moments, stochastic"),
    ("bf16: torch fused, nearest", "bf16: ours, fp32 master"),
    ("bf16: torch fused, nearest", "bf16: ours, split master"),
    ("bf16: torch fused, nearest", "bf16: ours, split8, 8-bit moments"),
    ("fp32 all: torch clip, fused, lerp, zero", "fp32 all: ours in one pass"),
]


def check(layers: int) -> dict[str, float]:
    """Compares three fp32 steps with torch's, and the mean move of bf16 weights with fp32's.

    The bf16 weights take 20 steps of one gradient.
    """
    results = []
    for make in (torchs(fused=True), ours()):
        variant = Variant(layers, FP32, 0, make)
        for _ in range(3):
            variant.step()
        results.append(torch.cat([weight.detach().flatten() for weight in variant.weights]))
    error = float((results[0] - results[1]).norm() / results[0].norm())
    assert error < 1e-6, f"fp32 differs from torch by {error:.1e}"
    moves = {"relative_difference_from_torch": error}
    for name, make in (("stochastic", ours()), ("nearest_torch", torchs(fused=True))):
        torch.manual_seed(0)
        weight = torch.nn.Parameter((torch.randn(1 << 18) * 0.02).bfloat16())
        start = weight.detach().float()
        optimizer = make([weight])
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        decayed = 20 * 1e-5 * (1 + 0.01 * start)
        moves[f"mean_move_{name}"] = float(((start - weight.detach().float()) / decayed).mean())
    assert abs(moves["mean_move_stochastic"] - 1) < 0.02, moves
    return moves


def floor_rate() -> float:
    """Bytes a second of an in-place product, read and written."""
    values = torch.ones(48_000_000)
    start = time.perf_counter()
    values.mul_(1.0)
    return 2 * values.nbytes / (time.perf_counter() - start)


def ratio_of(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median of the ratios of a round; the first step makes the states."""
    return statistics.median(a / b for a, b in zip(slow[1:], fast[1:], strict=True))


def measure(names: Sequence[str], layers: int, rounds: int) -> dict[str, Any]:
    """Only one family of variants is in memory at a time; all of it takes part in every round."""
    variants = {
        name: Variant(layers, *options) for name, options in VARIANTS.items() if name in names
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    rates = []
    for turn in range(rounds + 1):
        rates.append(floor_rate())
        order = list(variants)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            start = time.perf_counter()
            before = time.process_time()
            variants[name].step()
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - before)
    rate = statistics.median(rates[1:])
    rows = {}
    for name, variant in variants.items():
        median, quartiles = spread(seconds[name][1:])
        floor = variant.elements * variant.floor_bytes / rate
        rows[name] = {
            "ms": round(median * 1e3, 2),
            "spread_ms": round(quartiles * 1e3, 2),
            "cpu_ms": round(statistics.median(cpu[name][1:]) * 1e3, 1),
            "of_floor": round(median / floor, 2),
        }
    pairs = [pair for pair in RATIOS if variants.keys() >= set(pair)]
    return {
        "rows": rows,
        "ratios": {
            f"{slow} / {fast}": round(ratio_of(seconds[slow], seconds[fast]), 2)
            for slow, fast in pairs
        },
        "cpu_ratios": {
            f"{slow} / {fast}": round(ratio_of(cpu[slow], cpu[fast]), 2) for slow, fast in pairs
        },
        "gb_per_s": round(rate / 1e9, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train.optimizer", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--layers", type=int, default=3, help="of Qwen2-0.5B; fewer to see whether it runs"
    )
    parser.add_argument("--deepspeed", metavar="PYTHON", help="compare with its DeepSpeedCPUAdam")
    options = parser.parse_args(arguments)
    if options.deepspeed:
        command = [options.deepspeed, "-m", "bench.train.deepspeed_adam"]
        numbers = ["--threads", str(options.threads), "--rounds", str(options.rounds)]
        return subprocess.run([*command, *numbers], check=False).returncode
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {**machine(), "threads": options.threads, "torch": torch.__version__}
    report["checks"] = check(1)
    print(f"checks: {report['checks']}")
    for family in ("fp32:", "bf16:", "fp32 all:"):
        names = [name for name in VARIANTS if name.startswith(family)]
        family_report = measure(names, options.layers, options.rounds)
        print(f"\n{family.rstrip(':')}: in-place mul_ {family_report['gb_per_s']} GB/s")
        print(f"{'':42}{'ms':>9}{'spread':>9}{'CPU ms':>9}{'x floor':>9}")
        for name, row in family_report["rows"].items():
            wall = f"{row['ms']:9.2f}{row['spread_ms']:9.2f}"
            print(f"{name:42}{wall}{row['cpu_ms']:9.1f}{row['of_floor']:9.2f}")
        for name, ratio in family_report["ratios"].items():
            print(f"{ratio:6.2f} wall{family_report['cpu_ratios'][name]:7.2f} CPU  {name}")
        report[family.rstrip(":")] = family_report
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
