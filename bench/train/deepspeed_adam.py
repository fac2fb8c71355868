"""A step of FusedAdamW against DeepSpeedCPUAdam's, in an environment that holds both.

    PYTHON -m bench.train.deepspeed_adam [--parameters 200e6] [--threads 2] [--rounds 9]

bf16 weights and gradients, fp32 moments, in tensors of 16 million elements. DeepSpeed rounds the
weights to nearest and keeps no master. Both step once a round, in turns, and the median of the
rounds' ratios counts. DeepSpeed compiles its kernel at the first use: PYTHON's environment needs
ninja and a compiler. The results are compared before anything is timed.
"""

import argparse
import importlib
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from bench.support.measure import machine
from merit_fast.kernels.optimizer import FusedAdamW

SETTINGS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
TENSOR = 1 << 24
OURS: dict[str, dict[str, Any]] = {
    "ours, nearest": {"rounding": "nearest"},
    "ours, stochastic": {},
    "ours, stochastic, bf16 moments": {"moments": "bf16"},
    "ours, split8, 8-bit moments": {"master": "split8", "moments": "int8"},
}


def new_weights(count: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = [TENSOR] * (count // TENSOR) or [count]
    weights: list[Tensor] = []
    for size in sizes:
        weight = torch.nn.Parameter((torch.randn(size) * 0.02).to(dtype))
        weight.grad = (torch.randn(size) * 1e-3).to(dtype)
        weights.append(weight)
    return weights


def new_deepspeed(weights: list[Tensor]) -> Any:
    adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    return adam(weights, **SETTINGS, adamw_mode=True, fp32_optimizer_states=True)


def check() -> float:
    """Relative difference of three steps in fp32."""
    results = []
    for make in (new_deepspeed, lambda weights: FusedAdamW(weights, **SETTINGS)):
        weights = new_weights(100_003, torch.float32)
        optimizer = make(weights)
        for _ in range(3):
            optimizer.step()
        results.append(weights[0].detach().double())
    error = float((results[0] - results[1]).norm() / results[0].norm())
    assert error < 1e-6, f"three steps differ from DeepSpeed's by {error:.1e}"
    return error


def seconds_of(optimizer: Any) -> tuple[float, float]:
    """Wall and CPU seconds of a step."""
    start, before = time.perf_counter(), time.process_time()
    optimizer.step()
    return time.perf_counter() - start, time.process_time() - before


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train.deepspeed_adam", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--parameters", type=float, default=200e6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    count = int(options.parameters)
    report: dict[str, Any] = {**machine(), "threads": options.threads, "parameters": count}
    report["relative_difference"] = check()
    report["rows"] = {}
    for name, kinds in OURS.items():
        theirs = new_deepspeed(new_weights(count, torch.bfloat16))
        mine = FusedAdamW(new_weights(count, torch.bfloat16), **SETTINGS, **kinds)
        pairs = [(seconds_of(theirs), seconds_of(mine)) for _ in range(options.rounds + 1)][1:]
        row = {
            "deepspeed_ms": statistics.median(a[0] for a, _ in pairs) * 1e3,
            "ours_ms": statistics.median(b[0] for _, b in pairs) * 1e3,
            "wall_ratio": statistics.median(a[0] / b[0] for a, b in pairs),
            "cpu_ratio": statistics.median(a[1] / b[1] for a, b in pairs),
        }
        report["rows"][name] = {key: round(value, 2) for key, value in row.items()}
        print(f"{name:34} {report['rows'][name]}", flush=True)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
