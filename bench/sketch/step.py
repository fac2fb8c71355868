"""End-to-end cost of a sketch of every example's whole gradient against a plain step.

A plain step is one forward and backward pass.

    python -m bench.sketch.step DIR [--only 31m,moe,smollm,memory,7b] [--rounds 7] [--threads 1,2]
    [--quick]

31m: Qwen2's shape, 30.95 M parameters, B=8, T=128 and 512, fp32 and bf16. Every variant runs once a
round in one process, and each round starts with the next variant; ratios are within a round.
moe: Qwen3-MoE's shape, 2 of 8 experts a token, 45.6 M parameters, the same batches.
smollm: SmolLM2-135M in bf16 on four batches of the demo's tasks.
memory: one child process each (bench/sketch/memory.py).
7b: Qwen2.5-7B's shape with random bf16 weights, which needs 18 GiB of free memory.

Results are compared with exact gradients before anything is timed. Every finished round is kept as
a line of JSON in DIR: an interrupted run resumes there, and a finished one only prints its tables.
"""

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.merge.commands import version
from bench.sketch import memory
from bench.sketch.step_report import report
from bench.sketch.work import (
    PROJ_DIM,
    Step,
    Work,
    exact_gradients,
    frozen,
    moe_model,
    onednn,
    plain,
    relative_error,
    rotated,
    sketched,
    sketched_first,
    small_model,
    timed,
    token_work,
    training,
    training_sketched,
)
from bench.support.measure import Results, machine

Variant = Callable[[Work], contextlib.AbstractContextManager[Step]]
TABLES = ("31m", "moe", "smollm", "memory", "7b")
BATCH = 8


@contextlib.contextmanager
def plain_onednn(work: Work) -> Iterator[Step]:
    with onednn(work), plain(work) as step:
        yield step


@contextlib.contextmanager
def sketched_onednn(work: Work) -> Iterator[Step]:
    with onednn(work), sketched(work) as step:
        yield step


STEPS: dict[str, Variant] = {
    "plain": plain,
    "frozen": frozen,
    "sketch": sketched,
    "sketch, first pass": sketched_first,
}
ONEDNN: dict[str, Variant] = {"plain, oneDNN": plain_onednn, "sketch, oneDNN": sketched_onednn}
TRAINING: dict[str, Variant] = {"training": training, "training + sum": training_sketched}


@dataclass(frozen=True)
class Case:
    """One round of one table; the works' variants are compared with each other."""

    name: str
    dtype: str
    threads: int
    variants: dict[str, Variant]
    works: Callable[[], list[Work]]


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cases(arguments: argparse.Namespace) -> list[Case]:
    all_cases = []
    lengths = (16, 24) if arguments.quick else (128, 512)
    models: dict[str, list[Work]] = {}

    def works(make: Callable[[str, bool], nn.Module], dtype: str, tokens: int) -> list[Work]:
        name = f"{make.__name__} {dtype} {tokens}"
        if name not in models:
            models[name] = [token_work(make(dtype, arguments.quick), BATCH, tokens)]
        return models[name]

    def demo() -> list[Work]:
        if "demo" not in models:
            models["demo"] = demo_works(arguments)
        return models["demo"]

    for threads in arguments.threads:
        for dtype in ("fp32", "bf16") if "31m" in arguments.only else ():
            for tokens in lengths:
                variants = STEPS | (ONEDNN if dtype == "fp32" else {})
                variants |= TRAINING if tokens == lengths[0] else {}
                name = f"31m, {dtype}, T={tokens}, {threads} thread(s)"
                make = functools.partial(works, small_model, dtype, tokens)
                all_cases.append(Case(name, dtype, threads, variants, make))
        for dtype in ("fp32", "bf16") if "moe" in arguments.only else ():
            name = f"MoE, {dtype}, T={lengths[0]}, {threads} thread(s)"
            make = functools.partial(works, moe_model, dtype, lengths[0])
            all_cases.append(Case(name, dtype, threads, STEPS, make))
        if "smollm" in arguments.only:
            name = f"SmolLM2-135M, bf16, {threads} thread(s)"
            all_cases.append(Case(name, "bf16", threads, STEPS, demo))
    return all_cases


def demo_works(arguments: argparse.Namespace) -> list[Work]:
    """Batches of 8 examples from four tasks, made as the pipeline makes them.

    The losses are means over target tokens.
    """
    from bench.sketch.accuracy.gradients import load_tasks
    from merit_fast.data import collate
    from merit_fast.demo import default_cache, prepare_model
    from merit_fast.model import load_model, target_losses

    path = arguments.model or prepare_model(default_cache())
    datasets, pad = load_tasks(arguments.directory, path, quick=True)
    model = load_model(str(path), "bf16")
    works = []
    for dataset in datasets[::2]:
        batch = collate(dataset.examples[:BATCH], [0] * BATCH, pad)

        def losses(batch: Any = batch) -> torch.Tensor:
            tokens = target_losses(model, batch)
            zeros = tokens.loss.new_zeros(BATCH)
            sums = zeros.index_add(0, tokens.example, tokens.loss)
            return sums / zeros.index_add(0, tokens.example, torch.ones_like(tokens.loss))

        works.append(Work(model, losses, BATCH))
    return works


def check(case: Case, work: Work) -> None:
    """Checks sketches against exact gradients: one example's, and the sum over all."""
    from merit_fast.kernels.sketch import CountSketch, flat_sketch, matrix_shape

    def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        out = torch.zeros(1, PROJ_DIM)
        for name, gradient in gradients.items():
            flat_sketch(
                gradient.view(1, *matrix_shape(gradient.shape)),
                name,
                CountSketch(PROJ_DIM),
                out=out,
            )
        return out[0]

    # In bf16 torch rounds its own weight gradients and sums in blocks.
    bound = 1e-4 if case.dtype == "fp32" else 5e-2
    with sketched(work) as step:
        sketches = step()
    assert sketches is not None
    error = relative_error(sketches[BATCH - 1], flat(exact_gradients(work, BATCH - 1)))
    assert error < bound, f"{case.name}: a sketch is off by {error:.1e}"
    if "training + sum" in case.variants:
        with training_sketched(work) as step:
            total = step()
        assert total is not None
        error = relative_error(total[0], sketches.sum(0))
        assert error < bound, f"{case.name}: the sketch of the sum is off by {error:.1e}"
    if "plain, oneDNN" in case.variants:
        with sketched_onednn(work) as step:
            again = step()
        assert again is not None
        assert relative_error(again, sketches) < bound, f"{case.name}: oneDNN differs"
    work.model.zero_grad()


def run_round(case: Case, number: int) -> dict[str, dict[str, float]]:
    """Runs every variant once over all works of the case.

    The time excludes opening and closing a sketcher, and its first pass, which has a variant of its
    own: it is checked against autograd.
    """
    rows = {}
    for name in rotated(list(case.variants), number):
        total = {"wall_s": 0.0, "cpu_s": 0.0}
        for work in case.works():
            with case.variants[name](work) as step:
                taken = timed(step)
            work.model.zero_grad()
            total = {key: total[key] + taken[key] for key in total}
        rows[name] = total
    return rows


def measure(arguments: argparse.Namespace, results: Results) -> None:
    warm: set[str] = set()
    all_cases = cases(arguments)
    threads = torch.get_num_threads()
    for number in range(arguments.rounds):
        for case in all_cases:
            if sum(entry["case"] == case.name for entry in results.of("round")) > number:
                continue
            torch.set_num_threads(case.threads)
            if case.name not in warm:
                warm.add(case.name)
                for work in case.works():
                    check(case, work)
                run_round(case, 0)  # first calls set up kernels
            rows = run_round(case, number)
            results.add({"round": {"case": case.name, "rows": rows}})
            words = ", ".join(f"{name} {row['wall_s']:.3f} s" for name, row in rows.items())
            note(f"round {number + 1}, {case.name}: {words}")
    torch.set_num_threads(threads)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2]
    )
    parser.add_argument("--model", type=Path, help="a model directory instead of SmolLM2-135M")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(TABLES):
        parser.error(f"--only: must be of {', '.join(TABLES)}, got {', '.join(sorted(unknown))}")
    return arguments


def main() -> None:
    arguments = parse()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    circumstances = {
        "quick": arguments.quick,
        "proj_dim": PROJ_DIM,
        "version": version(),
        "machine": machine(),
    }
    file = arguments.directory / f"sketch_step{'-quick' if arguments.quick else ''}.jsonl"
    results = Results(file, circumstances)
    measure(arguments, results)
    memory.measure(arguments, results)
    print(report(results, circumstances))


if __name__ == "__main__":
    main()
