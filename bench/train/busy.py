"""Threads that wait next to busy processes: python -m bench.train.busy [--busy N] [--seconds S]

Times one call of some native kernels and of two of torch's next to N processes that compute without
end. OpenMP's threads spin by default while they wait for one another: each burns the time that the
other needs to be scheduled. OMP_WAIT_POLICY=passive lets them sleep; one thread waits for nobody.
Every setting runs in a process of its own, since OpenMP reads the variable when it is loaded. The
last line of standard output is one JSON object: setting -> call -> median microseconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

SETTINGS = {
    "spinning": (2, ""),
    "passive": (2, "passive"),
    "one thread": (1, ""),
}


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of some 0.1 ms to 20 ms on a quiet machine."""
    import torch

    from merit_fast.kernels.average import weighted_average
    from merit_fast.kernels.layers import rms_norm
    from merit_fast.kernels.sketch import CountSketch, flat_sketch, linear_grad_sketch

    sketch = CountSketch(65536)
    gradient = torch.randn(1, 576, 576)
    out = torch.zeros(1, 65536)
    x = torch.randn(8, 128, 576)
    weight = torch.ones(576)
    models = [torch.randn(1 << 20) for _ in range(4)]
    square = torch.randn(576, 576)
    yield "flat_sketch", lambda: flat_sketch(gradient, "w", sketch, out=out, backend="cpu")
    yield "linear_grad_sketch", lambda: linear_grad_sketch(x, x, "w", sketch, backend="cpu")
    yield "rms_norm", lambda: rms_norm(x, weight, 1e-6, backend="cpu")
    yield "weighted_average", lambda: weighted_average(models, [0.25] * 4, backend="cpu")
    yield "torch matmul", lambda: square @ square
    yield "torch mul", lambda: models[0] * 1.5


def measure(seconds: float, threads: int) -> dict[str, float]:
    """Median microseconds of every call, in this process."""
    import torch

    torch.set_num_threads(threads)
    medians = {}
    for name, call in calls():
        call()
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(taken) < 5:
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        medians[name] = 1e6 * statistics.median(taken)
    return medians


def measure_next_to(busy: int, seconds: float, setting: str) -> dict[str, float]:
    """``measure`` in a process with the setting's variable, next to ``busy`` others."""
    threads, policy = SETTINGS[setting]
    environment = {key: text for key, text in os.environ.items() if key != "OMP_WAIT_POLICY"}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    words = [sys.executable, "-m", "bench.train.busy", "--child", str(threads)]
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        child = subprocess.run(
            [*words, "--seconds", str(seconds)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    finally:
        for other in others:
            other.kill()
            other.wait()
    result: dict[str, float] = json.loads(child.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, default=2, help="busy processes")
    parser.add_argument("--seconds", type=float, default=0.5, help="time per call and setting")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.seconds, options.child)))
        return
    results = {}
    for setting in SETTINGS:
        for busy in sorted({0, options.busy}):
            name = f"{setting}, {busy} busy"
            results[name] = measure_next_to(busy, options.seconds, setting)
            figures = "  ".join(f"{call} {us:,.0f}" for call, us in results[name].items())
            print(f"{name}, median us: {figures}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
