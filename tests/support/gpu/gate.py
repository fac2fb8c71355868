"""The gate for Triton kernels without a GPU: python tests/support/gpu/gate.py [--update]

Compiles every launch of gpu_launches.py for five targets and compares registers, memory and instructions with
gpu_baseline.json. Says nothing of speed, races or results. ``--update`` writes the baseline anew. Exit code 1 if
anything fails.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton
from support.gpu.code import (
    MATRIX_PRODUCTS,
    WIDE_LOADS,
    WIDE_STORES,
    GpuCode,
    GpuLaunch,
    build,
    read,
)

BASELINE = Path(__file__).with_name("gpu_baseline.json")
TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "sm_120": 120, "gfx942": "gfx942"}
# What a block may have, by the makers' documents; a launch that wants more fails only on the GPU.
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
NEVER = ("spill_bytes", "atomics", "tf32")
NO_MORE = ("registers", "stack_bytes", "shared_bytes")
NO_LESS = (*MATRIX_PRODUCTS, "wide_loads", "wide_stores")

Figures = Mapping[str, int]
ByLaunch = Mapping[str, Mapping[str, Figures]]


def figures(code: GpuCode) -> Figures:
    """What the gate holds on to. ``wide``: 128 bits or more at a time, also into shared memory."""
    products = {
        kind: count for kind, pattern in MATRIX_PRODUCTS.items() if (count := code.count(pattern))
    }
    return {
        "registers": code.registers,
        "spill_bytes": code.spill_bytes,
        "stack_bytes": code.stack_bytes,
        "shared_bytes": code.shared_bytes,
        "wide_loads": code.count(WIDE_LOADS),
        "wide_stores": code.count(WIDE_STORES),
        "atomics": code.atomics,
        "tf32": code.tf32,
        **products,
    }


def measure(
    launches: Iterable[GpuLaunch], targets: Mapping[str, int | str]
) -> dict[str, dict[str, Figures]]:
    """Launch -> target -> figures. Code is read by other programs while the next launch is compiled."""
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(2) as pool, _compiled_in(cache):
        jobs = {}
        for launch in launches:
            for target, architecture in targets.items():
                try:
                    compiled = build(launch.kernel, launch.arguments, launch.options, architecture)
                except Exception as error:
                    error.add_note(f"{launch.name} does not compile for {target}")
                    raise
                jobs.setdefault(launch.name, {})[target] = pool.submit(read, compiled)
        return {
            name: {target: figures(job.result()) for target, job in row.items()}
            for name, row in jobs.items()
        }


@contextlib.contextmanager
def _compiled_in(cache: str):
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = cache
    try:
        yield
    finally:
        del os.environ["TRITON_CACHE_DIR"]
        if before is not None:
            os.environ["TRITON_CACHE_DIR"] = before


def failures(measured: ByLaunch, baseline: ByLaunch | None) -> list[str]:
    """One line each. Without a baseline only what holds for every compiler: NEVER, and shared memory that fits."""
    lines, rows = [], _flat(measured)
    for (name, target), row in rows.items():
        lines += [
            f"{name}, {target}: {quantity} must be 0, is {row[quantity]}"
            for quantity in NEVER
            if row[quantity]
        ]
        if row["shared_bytes"] > SHARED_KIB[target] << 10:
            lines.append(
                f"{name}, {target}: shared_bytes must be at most {SHARED_KIB[target] << 10}, is {row['shared_bytes']}"
            )
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


def load_baseline() -> tuple[ByLaunch | None, str | None]:
    """The baseline, or None and why it does not apply: compilers of other versions choose other registers."""
    stored = json.loads(BASELINE.read_text())
    if stored["triton"] != triton.__version__:
        return None, (
            f"{BASELINE.name} is of triton {stored['triton']}, installed is {triton.__version__}: "
            "only spills, atomics, tf32 and the size of shared memory are checked"
        )
    return stored["launches"], None


def save_baseline(measured: ByLaunch) -> None:
    """One line a target, so that a diff shows what changed where."""
    launches = ",\n".join(
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"   {json.dumps(target)}: {json.dumps(row)}" for target, row in rows.items())
        + "\n  }"
        for name, rows in measured.items()
    )
    BASELINE.write_text(
        f'{{\n "triton": "{triton.__version__}",\n "launches": {{\n{launches}\n }}\n}}\n'
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the baseline anew")
    update = parser.parse_args(arguments).update
    from support.gpu.launches import launches

    measured = measure(launches(), TARGETS)
    for name, rows in measured.items():
        for target, row in rows.items():
            print(
                f"{name}, {target}: "
                + ", ".join(f"{quantity} {value}" for quantity, value in row.items() if value)
            )
    if update:
        save_baseline(measured)
    baseline, remark = load_baseline()
    if remark:
        print(remark)
    lines = failures(measured, baseline)
    print(
        *lines,
        f"{len(measured)} launches for {len(TARGETS)} targets, {len(lines)} failures",
        sep="\n",
    )
    return 1 if lines or not measured else 0


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("gpu_gate: unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")
    sys.exit(main())
