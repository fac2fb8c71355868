"""Installs mergekit once in an environment of its own, since its dependencies are not ours.

    python -m bench.merge.mergekit_env [DIR]

DIR defaults to ~/.cache/merit_fast/mergekit-0.1.5 (about 2 GB). torch has the version and build of
this environment.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MERGEKIT = "0.1.5"
TORCH = "2.13.0"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
DEFAULT = Path.home() / ".cache/merit_fast" / f"mergekit-{MERGEKIT}"
OPTIONS = ("--lazy-unpickle", "--out-shard-size", "400M", "--async-write")

# Merges a small model first, so that no import and no first use of a library is in the time of the
# second.
DRIVER = """
import json, resource, sys, time
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
def merge(config, out):
    text = open(config).read()
    options = MergeOptions(
        lazy_unpickle=True, out_shard_size=400_000_000, async_write=True, quiet=True
    )
    recipe = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(recipe, out, config_source=text, options=options)
def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
merge(sys.argv[1], sys.argv[2])
start, before = time.perf_counter(), cpu()
merge(sys.argv[3], sys.argv[4])
print(json.dumps({"inner_wall_s": time.perf_counter() - start, "inner_cpu_s": cpu() - before}))
"""


def find_or_make(directory: Path = DEFAULT) -> tuple[Path | None, str]:
    """Returns the environment's interpreter or None, and one line about it; makes it if absent."""
    directory = directory.absolute()
    python = directory / "bin/python"
    if not python.exists():
        if directory.exists():
            return None, f"{directory}: is not an environment of mergekit; choose a new directory"
        torch = _pip(directory, f"torch=={TORCH}", "--index-url", CPU_WHEELS)
        steps = [
            [sys.executable, "-m", "venv", str(directory)],
            _pip(directory, f"torch=={TORCH}+cpu"),
            _pip(directory, f"mergekit=={MERGEKIT}"),
        ]
        for number, step in enumerate(steps):
            failure = _run(step)
            if failure and number == 1:  # an index that lists no local versions: torch's own
                failure = _run(torch)
            if failure:
                shutil.rmtree(directory, ignore_errors=True)
                return None, f"mergekit {MERGEKIT} could not be installed in {directory}: {failure}"
    return _check(python)


def parse_with_mergekit(
    parser: argparse.ArgumentParser,
) -> tuple[argparse.Namespace, Path, str]:
    """Parses arguments and ``--mergekit``; exits without the environment.

    Returns:
        (arguments, the environment's interpreter, one line about it).
    """
    parser.add_argument(
        "--mergekit", type=Path, default=DEFAULT, help="its environment; made if absent"
    )
    arguments = parser.parse_args()
    python, words = find_or_make(arguments.mergekit)
    if python is None:
        sys.exit(words)
    return arguments, python, words


def _check(python: Path) -> tuple[Path | None, str]:
    text = (
        "import importlib.metadata as m; "
        "print(m.version('mergekit'), m.version('torch').split('+')[0])"
    )
    process = subprocess.run([python, "-P", "-c", text], capture_output=True, text=True)
    if process.stdout.split() != [MERGEKIT, TORCH]:
        versions = process.stdout.strip() or process.stderr.strip().rpartition("\n")[2]
        rule = f"must have mergekit {MERGEKIT} and torch {TORCH}"
        return None, f"{python}: {rule}, got {versions}; remove the directory"
    return python, f"mergekit {MERGEKIT}, torch {TORCH}"


def _pip(directory: Path, *arguments: str) -> list[str]:
    return [str(directory / "bin/pip"), "install", "-q", "--disable-pip-version-check", *arguments]


def _run(command: Sequence[str]) -> str:
    """Runs a command; returns the reason of a failure, or ""."""
    process = subprocess.run(command, capture_output=True, text=True)
    lines = [
        line for line in process.stderr.splitlines() if "ERROR" in line
    ] or process.stderr.splitlines()
    return "" if process.returncode == 0 else (lines or [f"exit {process.returncode}"])[-1]


def config(
    method: str,
    models: Sequence[Path],
    weights: Sequence[float] = (),
    base: Path | None = None,
    **shared: float,
) -> str:
    """A mergekit configuration (JSON is YAML); ``shared`` holds parameters of all models."""
    entries: list[dict[str, Any]] = [{"model": str(model)} for model in models]
    for entry, weight in zip(entries, weights, strict=False):
        entry["parameters"] = {"weight": weight}
    values = {"merge_method": method, "dtype": "bfloat16", "models": entries, "parameters": shared}
    return json.dumps({**values, **({"base_model": str(base)} if base else {})}, indent=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, nargs="?", default=DEFAULT)
    python, words = find_or_make(parser.parse_args().directory)
    print(words)
    sys.exit(python is None)


if __name__ == "__main__":
    main()
