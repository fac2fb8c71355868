"""The sketch's peers in an environment of their own, made once: they need other dependencies.

    python -m bench.sketch.peers_env [DIR]

DIR defaults to ~/.cache/merit_fast/sketch-peers (about 2 GB). torch and transformers have this
environment's versions. A peer that cannot be installed next to the others is named and left out.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
TORCH = "2.13.0"
TRANSFORMERS = "5.23.0"
PEERS = {
    "opacus": "1.6.0",
    "bergson": "2.5.1",
    "dattri": "0.3.0",
    "dattri-llm": "0.1.0",
    "traker": "0.3.2",
}
DEFAULT = Path.home() / ".cache/merit_fast/sketch-peers"
VERSIONS = """
import importlib.metadata as m, json, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return ""
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


def find_or_make(directory: Path = DEFAULT) -> tuple[Path | None, dict[str, str]]:
    """Returns the environment's interpreter, or None, and each package's version or its problem."""
    directory = directory.absolute()
    python = directory / "bin/python"
    words = {}
    if not python.exists():
        if directory.exists():
            return None, {
                "environment": f"{directory}: is not an environment; choose a new directory"
            }
        failure = _run([sys.executable, "-m", "venv", directory]) or _install_torch(python)
        if failure:
            return None, {
                "environment": f"{directory}: torch {TORCH} could not be installed: {failure}"
            }
        for name, version in PEERS.items():
            if failure := _pip(
                python, f"torch=={TORCH}", f"transformers=={TRANSFORMERS}", f"{name}=={version}"
            ):
                words[name] = f"could not be installed: {failure}"
        # Dependencies built for another torch: transformers would import them and fail.
        _run([python, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio"])
    return python, {**_versions(python), **words}


def _install_torch(python: Path) -> str:
    failure = _pip(python, f"torch=={TORCH}+cpu")
    if failure:  # the index lists no local versions
        failure = _pip(python, f"torch=={TORCH}", "--index-url", CPU_WHEELS)
    return failure or _pip(python, f"torch=={TORCH}", f"transformers=={TRANSFORMERS}")


def _versions(python: Path) -> dict[str, str]:
    """Installed versions by package; a missing one is reported as not installed."""
    names = ("torch", "transformers", *PEERS)
    process = subprocess.run([python, "-I", "-c", VERSIONS, *names], capture_output=True, text=True)
    if process.returncode:
        return {"environment": process.stderr.strip().rpartition("\n")[2]}
    versions: dict[str, str] = json.loads(process.stdout)
    return {name: version or "is not installed" for name, version in versions.items()}


def _pip(python: Path, *arguments: str) -> str:
    return _run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments])


def _run(command: Sequence[str | Path]) -> str:
    """Runs a command; returns the reason of its failure, or ""."""
    process = subprocess.run(command, capture_output=True, text=True)
    lines = [
        line for line in process.stderr.splitlines() if "ERROR" in line
    ] or process.stderr.splitlines()
    return "" if process.returncode == 0 else (lines or [f"exit {process.returncode}"])[-1][:300]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, nargs="?", default=DEFAULT)
    python, words = find_or_make(parser.parse_args().directory)
    print("\n".join(f"{name}: {word}" for name, word in words.items()))
    sys.exit(python is None)


if __name__ == "__main__":
    main()
