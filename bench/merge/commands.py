"""Measures merges of whole checkpoints against other tools and the machine's floors.

    python -m bench.merge.commands DIR [--size 0.5b|mini|tiny] [--rounds 5] [--only
    linear,ties,cold]

DIR needs 12 GB for 0.5b, on the disk that is to be measured. Rows of a group run in turn, each
round starting with the next one. A finished round is kept in a file of JSON lines: an interrupted
run resumes, a finished one only prints its tables. mergekit runs in an environment of its own, made
at the first use (bench/merge/mergekit_env.py).
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.merge import mergekit_env
from bench.merge.checkpoints import SIZES, ensure_checkpoints
from bench.merge.report import Figures, report
from bench.merge.rows import GROUPS, ROOT, Row, Setup, rows
from bench.support.measure import Results, cached_share, drop, machine, read_all, run_child

PARTS = (*GROUPS, "bits")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_row(setup: Setup, row: Row, keep: Path | None) -> dict[str, Any]:
    """Runs a row from a settled disk: no old output, nothing to write back, cache as asked."""
    for leftover in (setup.out, setup.scratch / "out-small"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    os.sync()
    drop(row.inputs) if row.cold else read_all(row.inputs)
    cached = cached_share(row.inputs) if row.inputs else None
    result = run_child(row.command(), row.environment, row.folder)
    if keep is not None and "error" not in result:
        shutil.rmtree(keep, ignore_errors=True)
        os.replace(setup.out, keep)
    return result | ({} if cached is None else {"cached_before": cached})


def run_round(
    setup: Setup, group: Sequence[Row], name: str, number: int, skip: set[str], limit: int
) -> dict[str, Any]:
    """Runs every row of a group once, starting with another one each round.

    ``skip`` grows by the rows that fail.
    """
    start = number % len(group)
    measured = {}
    for row in itertools.chain(group[start:], group[:start]):
        if row.name in skip or (row.slow and number >= limit):
            continue
        keep = setup.scratch / f"kept-{name}-{row.name}" if row.kept and number == 0 else None
        measured[row.name] = result = run_row(setup, row, keep)
        words = result.get("error") or f"{result['wall_s']:.3f} s, {result['peak_mib']:.1f} MiB"
        note(f"round {number + 1}, {name}: {row.name}: {words}")
        if "error" in result:
            skip.add(row.name)
    return measured


def version() -> str:
    """The commit, with a mark if the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return process.stdout.strip() or "unknown"


def measure(arguments: argparse.Namespace, setup: Setup, results: Results) -> None:
    """Measures the rounds and parts that the file does not hold yet."""
    groups = rows(setup)
    skip = {name: set(arguments.skip) for name in groups}
    for number in range(arguments.rounds):
        for name in arguments.only:
            if (
                name in groups
                and sum(record["group"] == name for record in results.of("round")) <= number
            ):
                done = run_round(
                    setup, groups[name], name, number, skip[name], arguments.mergekit_rounds
                )
                results.add({"round": {"group": name, "rows": done}})
    if "bits" in arguments.only and not results.of("bits"):
        from bench.merge.bits import count_all

        results.add({"bits": count_all(setup, note)})
    for leftover in setup.scratch.glob("out*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names: dict[str, Any] = {"type": lambda text: text.split(",")}
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--mergekit-rounds",
        type=int,
        default=2,
        help="rounds of mergekit's cold, ties and slerp rows",
    )
    parser.add_argument("--only", default=list(PARTS), **names, help=f"parts, of {','.join(PARTS)}")
    parser.add_argument(
        "--skip", default=[], **names, help="rows to leave out, as named in the progress"
    )
    parser.add_argument(
        "--mergekit", type=Path, default=mergekit_env.DEFAULT, help="directory of its environment"
    )
    parser.add_argument("--no-mergekit", action="store_true", help="without its rows")
    parser.add_argument(
        "--json", type=Path, help="file of results [default: DIR/bench_merge-SIZE.jsonl]"
    )
    parsed = parser.parse_args(arguments)
    if unknown := set(parsed.only) - set(PARTS):
        parser.error(f"--only: must be of {','.join(PARTS)}, got {','.join(sorted(unknown))}")
    return parsed


def main() -> None:
    arguments = parse()
    python = None
    words = "without mergekit, as asked"
    if not arguments.no_mergekit:
        note("looking for mergekit's environment, or making it")
        python, words = mergekit_env.find_or_make(arguments.mergekit)
    note(words)
    root = arguments.directory.absolute()
    root.mkdir(parents=True, exist_ok=True)
    base, *models = ensure_checkpoints(root, arguments.size)
    scratch = root / f"scratch-{arguments.size}"
    setup = Setup(base, tuple(models), tuple(ensure_checkpoints(root, "tiny")[1:]), scratch, python)
    circumstances = {
        "size": arguments.size,
        "version": version(),
        "mergekit": words,
        "machine": machine(),
    }
    results = Results(arguments.json or root / f"bench_merge-{arguments.size}.jsonl", circumstances)
    if not results.records:
        shutil.rmtree(scratch, ignore_errors=True)  # outputs kept by an earlier version
    scratch.mkdir(exist_ok=True)
    measure(arguments, setup, results)
    print(report(Figures.read(results, rows(setup)), circumstances))


if __name__ == "__main__":
    main()
