"""Compares a command between a commit and the present tree, run in turns (A B A B ...).

    python -m bench.compare --base REF [--rounds 5] [--figure NAME] -- python -m bench.train.layers

The base is checked out as a git worktree of its own, which is removed at the end. A compiled
``merit_fast/_C*.so`` of the present tree is copied there unless ``--build`` compiles the base's
own: copy it only where csrc/ is the same in both. The command runs in the root of either tree, with
PYTHONPATH set to it; a first word ``python`` stands for this interpreter. Compared are the wall
seconds of the whole command, or with ``--figure`` a number from the JSON object on the last line of
its output. Every pair of neighbouring runs gives a ratio, base over present: above 1 the present
tree is faster.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.support.measure import machine, spread

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Comparison:
    """The figures of every round, pair by pair."""

    base: list[float]
    present: list[float]

    @property
    def ratios(self) -> list[float]:
        """Base over present of every pair."""
        return [base / present for base, present in zip(self.base, self.present, strict=True)]

    def lines(self, unit: str) -> Iterator[str]:
        """Medians with interquartile ranges, then the ratio of every pair and their median."""
        for name, values in (("base", self.base), ("present", self.present)):
            median, width = spread(values)
            yield f"{name:8} median {median:.4g} {unit}, interquartile range {width:.2g}"
        for number, ratio in enumerate(self.ratios, 1):
            yield f"pair {number}: base / present {ratio:.3f}"
        low = min(self.ratios)
        high = max(self.ratios)
        median = statistics.median(self.ratios)
        yield f"ratio    median {median:.3f}, {low:.3f} to {high:.3f}, {len(self.ratios)} pairs"


@contextlib.contextmanager
def worktree(reference: str, build: bool) -> Iterator[Path]:
    """Checks a commit out into a folder of its own and removes it at the end.

    Raises:
        SystemExit: git knows no such commit, or the build fails.
    """
    with tempfile.TemporaryDirectory(prefix="merit-fast-base-") as folder:
        tree = Path(folder, "tree")
        run_checked(["git", "worktree", "add", "--detach", "--quiet", str(tree), reference], ROOT)
        try:
            if build:
                run_checked([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree)
            else:
                for library in (ROOT / "merit_fast").glob("_C*.so"):
                    shutil.copy2(library, tree / "merit_fast" / library.name)
            yield tree
        finally:
            run_checked(["git", "worktree", "remove", "--force", str(tree)], ROOT)


def run_checked(command: Sequence[str], folder: Path) -> str:
    """Runs a command in a folder and returns its output.

    Raises:
        SystemExit: the command fails; the message ends with the last line of its errors.
    """
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if process.returncode:
        reason = process.stderr.strip().rpartition("\n")[2] or f"exit code {process.returncode}"
        sys.exit(f"compare: {' '.join(command)}: fails in {folder}: {reason}")
    return process.stdout


def measure(command: Sequence[str], folder: Path, figure: str | None) -> float:
    """One run: its wall seconds, or the named number of its last line.

    Raises:
        SystemExit: the command fails, or its last line has no such number.
    """
    start = time.perf_counter()
    output = run_checked(command, folder)
    seconds = time.perf_counter() - start
    if figure is None:
        return seconds
    try:
        value = json.loads(output.strip().rpartition("\n")[2])
        for key in figure.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
        return float(value)
    except (ValueError, KeyError, IndexError, TypeError):
        sys.exit(f"compare: --figure {figure}: the last line of the output has no such number")


def compare(
    command: Sequence[str], base: Path, present: Path, rounds: int, figure: str | None
) -> Comparison:
    """Runs the command in both trees in turns, the base first."""
    result = Comparison([], [])
    for number in range(rounds):
        result.base.append(measure(command, base, figure))
        result.present.append(measure(command, present, figure))
        pair = f"base {result.base[-1]:.4g}, present {result.present[-1]:.4g}"
        print(f"round {number + 1}: {pair}", file=sys.stderr, flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", required=True, metavar="REF", help="commit to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs [default: 5]")
    parser.add_argument(
        "--figure", metavar="NAME", help="number of the last line's JSON, as rows.0.ours_us"
    )
    parser.add_argument("--build", action="store_true", help="compile the base's native module")
    parser.add_argument("command", nargs="+", help="the command, after --")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: must be at least 1, got {options.rounds}")
    command = list(options.command)
    if command[0] == "python":
        command[0] = sys.executable
    with worktree(options.base, options.build) as base:
        result = compare(command, base, ROOT, options.rounds, options.figure)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(*result.lines(options.figure or "s"), sep="\n")


if __name__ == "__main__":
    main()
