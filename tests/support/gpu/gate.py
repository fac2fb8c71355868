"""The gate for Triton kernels without a GPU: python -m support.gpu.gate [--update]

Compiles every launch of launches.py for five targets and compares registers, memory and
instructions with gpu_baseline.json. It proves nothing of speed, races or results. ``--update``
writes the baseline, with the fingerprint of every launch. Exit code 1 if anything fails.

``measure_changed`` compiles less: a launch whose fingerprint is the baseline's keeps the
baseline's figures, and a sample is compiled all the same.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from support.gpu.code import GpuLaunch, build, compile_launch
from support.gpu.read_code import MATRIX_PRODUCTS, GpuCode, figures

BASELINE = Path(__file__).with_name("gpu_baseline.json")
TARGETS: dict[str, int | str] = {
    "sm_80": 80,
    "sm_90": 90,
    "sm_100": 100,
    "sm_120": 120,
    "gfx942": "gfx942",
}
# A block's shared memory by the makers' documents; a launch that wants more fails only on the GPU.
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
NEVER = ("spill_bytes", "atomics", "tf32")
NO_MORE = ("registers", "stack_bytes", "shared_bytes")
NO_LESS = (*MATRIX_PRODUCTS, "wide_loads", "wide_stores")

Figures = Mapping[str, int]
ByLaunch = Mapping[str, Mapping[str, Figures]]
Targets = Mapping[str, int | str]


@dataclass(frozen=True)
class Baseline:
    launches: ByLaunch
    fingerprints: Mapping[str, Mapping[str, str]]  # launch -> target -> fingerprint


def measure(launches: Iterable[GpuLaunch], targets: Targets) -> dict[str, dict[str, Figures]]:
    """Launch -> target -> figures. Threads read code while the next launch is compiled."""
    with ThreadPoolExecutor(2) as pool:
        jobs: dict[str, dict[str, Future[GpuCode]]] = {}
        for launch in launches:
            for target, architecture in targets.items():
                with _named(launch, target):
                    read = build(launch.kernel, launch.arguments, launch.options, architecture)
                jobs.setdefault(launch.name, {})[target] = pool.submit(read)
        return {
            name: {target: figures(job.result()) for target, job in row.items()}
            for name, row in jobs.items()
        }


@contextlib.contextmanager
def _named(launch: GpuLaunch, target: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"{launch.name} does not compile for {target}")
        raise


def measure_changed(
    launches: Sequence[GpuLaunch], targets: Targets, baseline: Baseline | None
) -> tuple[dict[str, dict[str, Figures]], set[tuple[str, str]]]:
    """Launch -> target -> figures, and the (launch, target) pairs that the baseline does not know.

    A pair of the baseline's fingerprint has the baseline's figures; another pair is compiled, once
    for each checkout. The pairs of ``sample`` are always compiled.
    """
    fingerprints = baseline.fingerprints if baseline else {}
    known_figures = baseline.launches if baseline else {}
    sampled = sample(launches, targets)
    rows: dict[str, dict[str, Figures]] = {}
    changed = set()
    for launch in launches:
        row = rows[launch.name] = {}
        for target, architecture in targets.items():
            known = fingerprints.get(launch.name, {}).get(target)
            is_known = known == launch.fingerprint(architecture)
            if not is_known:
                changed.add((launch.name, target))
            if (launch.name, target) in sampled:
                row[target] = measure([launch], {target: architecture})[launch.name][target]
            elif is_known:
                row[target] = known_figures[launch.name][target]
            else:
                with _named(launch, target):
                    code = compile_launch(
                        launch.kernel, launch.arguments, launch.options, architecture
                    )
                row[target] = figures(code)
    return rows, changed


def figures_of(launch: GpuLaunch, architecture: int | str) -> Figures:
    """A launch's figures: of the baseline where its fingerprint is there, else compiled."""
    known = _known_figures().get(launch.fingerprint(architecture))
    if known is not None:
        return known
    return figures(compile_launch(launch.kernel, launch.arguments, launch.options, architecture))


@functools.cache
def _known_figures() -> Mapping[str, Figures]:
    """Fingerprint -> figures, of the baseline; empty where no baseline applies."""
    baseline, _ = load_baseline()
    if baseline is None:
        return {}
    return {
        fingerprint: baseline.launches[name][target]
        for name, row in baseline.fingerprints.items()
        for target, fingerprint in row.items()
    }


def sample(launches: Iterable[GpuLaunch], targets: Targets) -> set[tuple[str, str]]:
    """The first launch of every kernel, each for the next target in turn."""
    first: dict[Any, str] = {}
    for launch in launches:
        first.setdefault(launch.kernel, launch.name)
    names = list(targets)
    return {(name, names[i % len(names)]) for i, name in enumerate(first.values())}


def failures(measured: ByLaunch, baseline: ByLaunch | None) -> list[str]:
    """One line each. Without a baseline only the rules for every compiler: NEVER, shared memory."""
    lines = []
    rows = _flat(measured)
    for (name, target), row in rows.items():
        lines += [
            f"{name}, {target}: {quantity} must be 0, is {row[quantity]}"
            for quantity in NEVER
            if row[quantity]
        ]
        if row["shared_bytes"] > SHARED_KIB[target] << 10:
            most, size = SHARED_KIB[target] << 10, row["shared_bytes"]
            lines.append(f"{name}, {target}: shared_bytes must be at most {most}, is {size}")
    if baseline is None:
        return lines
    before = _flat(baseline)
    for place, row in rows.items():
        changes = _changes(before[place], row) if place in before else ["is not in the baseline"]
        lines += [f"{', '.join(place)}: {change}" for change in changes]
    return lines + [
        f"{', '.join(place)}: is in the baseline only" for place in before if place not in rows
    ]


def _flat(figures: ByLaunch) -> dict[tuple[str, str], Figures]:
    return {(name, target): row for name, rows in figures.items() for target, row in rows.items()}


def _changes(before: Figures, now: Figures) -> Iterable[str]:
    for quantity in (*NO_MORE, *NO_LESS):
        old, new = before.get(quantity, 0), now.get(quantity, 0)
        if (new > old) if quantity in NO_MORE else (new < old):
            yield f"{quantity} was {old} in the baseline, is {new}"


def load_baseline() -> tuple[Baseline | None, str | None]:
    """The baseline, or None and the reason: other versions of Triton choose other registers."""
    stored = json.loads(BASELINE.read_text())
    if stored["triton"] != triton.__version__:
        return None, (
            f"{BASELINE.name} is of triton {stored['triton']}, installed is {triton.__version__}: "
            "only spills, atomics, tf32 and the size of shared memory are checked"
        )
    return Baseline(stored["launches"], stored.get("fingerprints", {})), None


def save_baseline(measured: ByLaunch, launches: Iterable[GpuLaunch], targets: Targets) -> None:
    """Writes figures, one target a line, and fingerprints, one launch a line."""
    fingerprints = {
        launch.name: {target: launch.fingerprint(at) for target, at in targets.items()}
        for launch in launches
    }
    figures_text = ",\n".join(
        f"  {json.dumps(name)}: {{\n{_lines(rows, indent=3)}\n  }}"
        for name, rows in measured.items()
    )
    BASELINE.write_text(
        f'{{\n "triton": "{triton.__version__}",\n'
        f' "fingerprints": {{\n{_lines(fingerprints, indent=2)}\n }},\n'
        f' "launches": {{\n{figures_text}\n }}\n}}\n'
    )


def _lines(rows: Mapping[str, object], indent: int) -> str:
    pairs = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return ",\n".join(" " * indent + pair for pair in pairs)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the baseline")
    update = parser.parse_args(arguments).update
    from support.gpu.launches import launches

    asked = launches()
    measured = measure(asked, TARGETS)
    for name, rows in measured.items():
        for target, row in rows.items():
            print(
                f"{name}, {target}: "
                + ", ".join(f"{quantity} {value}" for quantity, value in row.items() if value)
            )
    if update:
        save_baseline(measured, asked, TARGETS)
    baseline, remark = load_baseline()
    if remark:
        print(remark)
    lines = failures(measured, baseline.launches if baseline else None)
    print(
        *lines,
        f"{len(measured)} launches for {len(TARGETS)} targets, {len(lines)} failures",
        sep="\n",
    )
    return 1 if lines or not measured else 0


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("gate: unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")
    sys.exit(main())
