"""Measures how fast the merge command starts, in CPU seconds, which a busy machine changes least.

    python -m bench.cli.start_up DIR [--rounds 15]

Commands run in turns. The last line is JSON, for bench.compare:

    python -m bench.compare --base REF --figure plan.cpu_s -- python -m bench.cli.start_up DIR
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.merge.checkpoints import ensure_checkpoints
from bench.support.measure import machine, run_child

ROOT = Path(__file__).resolve().parents[2]
COUNT = (
    "import atexit, sys; sys.argv = sys.argv[1:];"
    "atexit.register(lambda: print(len(sys.modules), file=sys.stderr));"
    "from merit_fast.cli.main import main; main()"
)


def commands(models: Sequence[Path], out: Path) -> dict[str, list[str]]:
    """Arguments of Python, by name."""
    words = ["merge", str(out), "--weights", "uniform", "--json"]
    for model in models:
        words += ["--model", str(model)]
    return {
        "python": ["-c", "pass"],
        "help": ["-m", "merit_fast", "merge", "--help"],
        "plan": ["-m", "merit_fast", *words, "--dry-run"],
        "merge": ["-m", "merit_fast", *words, "--no-fsync"],
    }


def modules_of(words: Sequence[str], environment: dict[str, str]) -> int:
    """Modules that a command has loaded when it ends."""
    command = [sys.executable, "-c", COUNT, "merit-fast", *words]
    process = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(process.stderr.split()[-1])


def measure(directory: Path, rounds: int) -> dict[str, Any]:
    """Medians of CPU and wall seconds, peak memory and modules, by command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    os.environ.clear()
    os.environ.update(environment)
    out = directory / "start-up-out"
    listed = commands(ensure_checkpoints(directory, "tiny")[1:], out)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in listed}
    for number in range(rounds + 1):  # the first one writes the bytecode
        for name, words in listed.items():
            shutil.rmtree(out, ignore_errors=True)
            result = run_child([sys.executable, *words], folder=directory)
            if "error" in result:
                raise SystemExit(f"{name}: {result['error']}")
            if number:
                results[name].append(result)
    shutil.rmtree(out, ignore_errors=True)
    figures = {}
    for name, runs in results.items():
        figures[name] = {
            "cpu_s": statistics.median(run["cpu_s"] for run in runs),
            "least_cpu_s": min(run["cpu_s"] for run in runs),
            "wall_s": statistics.median(run["wall_s"] for run in runs),
            "peak_mib": max(run["peak_mib"] for run in runs),
        }
        if name != "python":
            figures[name]["modules"] = modules_of(listed[name][2:], environment)
    shutil.rmtree(out, ignore_errors=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    directory = arguments.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    figures = measure(directory, arguments.rounds)
    print(f"{machine()['processor']}; {arguments.rounds} rounds in turns")
    print("| | CPU s, median (least) | wall s | peak MiB | modules |\n|---|---|---|---|---|")
    for name, each in figures.items():
        cpu = f"{each['cpu_s']:.3f} ({each['least_cpu_s']:.3f})"
        modules = each.get("modules", "")
        print(f"| {name} | {cpu} | {each['wall_s']:.3f} | {each['peak_mib']:.1f} | {modules} |")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
