"""A whole training step against transformers' Trainer: tokens a second, loss curve, peak memory.

    python -m bench.train.step DIR [--steps 6] [--rounds 2] [--only speed,memory,profile]

- speed: SmolLM2-135M in fp32 on the demo's rows. Every variant takes the same rows in the same
  order, a run of --steps steps each; variants alternate within a round and each round starts with
  the next one. The first step of a run is left out of the times, since it makes the optimizer's
  states. Ratios are of one round. Loss curves must agree before times are shown.
- memory: Qwen2-0.5B's shape (--dtype, --layers), a process each (bench/train/memory.py).
- profile: shares of two steps by operator, from torch.profiler, with our kernels and without.

The last line of standard output is JSON.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.sketch.work import rotated
from bench.support.measure import machine, run_child, spread
from bench.train.memory import VARIANTS as MEMORY
from bench.train.step_variants import VARIANTS, Run, Work
from merit_fast.data import count_target_tokens

PARTS = ("speed", "memory", "profile")
CURVES_AGREE = 2e-3  # relative, for the mean loss of a step


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def demo_work(arguments: argparse.Namespace) -> Work:
    """The demo's rows of all tasks in a random order."""
    import numpy as np

    from bench.sketch.accuracy.gradients import load_tasks
    from merit_fast.demo import default_cache, prepare_model

    path = prepare_model(default_cache())
    datasets, padding = load_tasks(arguments.directory, path, quick=True)
    examples = [example for dataset in datasets for example in dataset.examples]
    order = np.random.default_rng(0).permutation(len(examples))[: arguments.steps * arguments.batch]
    return Work(str(path), [examples[i] for i in order], arguments.batch, padding)


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    work = demo_work(arguments)
    tokens = sum(len(e.input_ids) for e in work.examples[work.batch_size :])
    targets = sum(count_target_tokens(e.labels) for e in work.examples[work.batch_size :])
    runs: dict[str, list[Run]] = {name: [] for name in VARIANTS}
    for number in range(arguments.rounds):
        for name in rotated(list(VARIANTS), number):
            with tempfile.TemporaryDirectory() as folder:
                runs[name].append(VARIANTS[name](work, Path(folder)))
            note(f"round {number + 1}, {name}: {sum(runs[name][-1].wall_s[1:]):.1f} s")
    curve = runs["Trainer"][0].losses
    for name, repeats in runs.items():
        for run in repeats:
            furthest = max(abs(a - b) / b for a, b in zip(run.losses, curve, strict=True))
            assert furthest < CURVES_AGREE, (
                f"{name}: a step's loss is off by {furthest:.1e}: {run.losses} {curve}"
            )
    rows: dict[str, Any] = {}
    for name, repeats in runs.items():
        stock = runs["Trainer"]
        rows[name] = {
            "tokens_per_s": spread([tokens / sum(run.wall_s[1:]) for run in repeats]),
            "target_tokens_per_s": spread([targets / sum(run.wall_s[1:]) for run in repeats]),
            "wall_speedup": spread(
                [sum(s.wall_s[1:]) / sum(r.wall_s[1:]) for r, s in zip(repeats, stock, strict=True)]
            ),
            "cpu_speedup": spread(
                [sum(s.cpu_s[1:]) / sum(r.cpu_s[1:]) for r, s in zip(repeats, stock, strict=True)]
            ),
            "curve_off_by": max(
                abs(a - b) / b for r in repeats for a, b in zip(r.losses, curve, strict=True)
            ),
        }
    size = f"{work.steps} steps of {work.batch_size} rows, {tokens} tokens, {targets} targets"
    print(f"SmolLM2-135M, fp32, {size}")
    print(f"{'':24}{'tokens/s':>10}{'targets/s':>11}{'wall x':>8}{'CPU x':>8}{'curve off by':>14}")
    for name, row in rows.items():
        numbers = [
            row[key][0]
            for key in ("tokens_per_s", "target_tokens_per_s", "wall_speedup", "cpu_speedup")
        ]
        cells = f"{numbers[0]:10.1f}{numbers[1]:11.1f}{numbers[2]:8.2f}{numbers[3]:8.2f}"
        print(f"{name:24}{cells}{row['curve_off_by']:14.1e}")
    return {"rows": rows, "curve": curve, "tokens": tokens, "targets": targets}


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for variant in MEMORY:
        command = [sys.executable, "-m", "bench.train.memory", variant, "--dtype", arguments.dtype]
        command += ["--layers", str(arguments.layers), "--tokens", str(arguments.tokens)]
        figures[variant] = run_child(command)
        note(f"{variant}: {figures[variant]}")
        assert "error" not in figures[variant], figures[variant]
    stock = figures["stock"]
    size = f"{arguments.layers} layers, {arguments.dtype}, T={arguments.tokens}"
    print(f"\nQwen2-0.5B's shape, {size}: peak over weights")
    for variant, row in figures.items():
        share = f"{row['above_mib'] / stock['above_mib']:8.2f} of stock"
        print(f"{variant:24}{row['above_mib']:10.0f} MiB{share}{row['step_s']:8.1f} s a step")
        assert abs(row["loss_0"] - stock["loss_0"]) < 1e-3 * stock["loss_0"], variant
    return figures


def profile(arguments: argparse.Namespace) -> dict[str, Any]:
    """Self CPU time by operator of two steps, with loading, which is small next to them."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    work = demo_work(arguments)
    work = Work(work.model, work.examples[: 2 * work.batch_size], work.batch_size, work.padding)
    shares = {}
    for name in ("train, kernels eager", "train"):
        with profiled(activities=[ProfilerActivity.CPU]) as taken:
            VARIANTS[name](work, arguments.directory)
        events = sorted(taken.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        shares[name] = {event.key: event.self_cpu_time_total / total for event in events[:14]}
        print(f"\n{name}: share of {total / 1e6:.1f} s")
        for key, share in shares[name].items():
            print(f"  {share:6.1%}  {key}")
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    parts = {"speed": speed, "memory": memory, "profile": profile}
    results = {name: run(arguments) for name, run in parts.items() if name in arguments.only}
    print(json.dumps({"machine": machine(), "threads": arguments.threads, **results}))


if __name__ == "__main__":
    main()
