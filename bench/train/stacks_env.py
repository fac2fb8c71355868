"""Environments of axolotl, LLaMA-Factory and ms-swift, made once: they pin versions of their own.

    python -m bench.train.stacks_env [DIR]

DIR defaults to ~/.cache/merit_fast/stacks: one environment per stack, 1.5 GB together. They read
torch and everything else that a stack does not pin from this environment. Only what their parsers,
loaders and trainers import on a CPU is installed; tests in `tests/engines` run there.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT = Path.home() / ".cache/merit_fast/stacks"


@dataclass(frozen=True)
class Environment:
    """The packages of one stack, installed without their dependencies.

    Attributes:
        packages: as pip takes them.
        stand_ins: modules that are imported and not used on text; a comment takes their place.
        check: modules whose import shows that the environment works.
    """

    packages: tuple[str, ...]
    check: tuple[str, ...]
    stand_ins: tuple[str, ...] = field(default=())


ENVIRONMENTS = {
    "axolotl": Environment(
        (
            *("axolotl==0.19.0", "transformers==5.16.1", "trl==1.9.0", "accelerate==1.13.0"),
            *("peft==0.20.0", "datasets==4.8.4", "huggingface_hub==1.17.0", "tokenizers==0.23.1"),
            *("fsspec==2026.2.0", "optimum==1.16.2", "bitsandbytes==0.50.2"),
            *("axolotl-contribs-lgpl", "axolotl-contribs-mit", "addict", "art", "backoff"),
            *("distro", "einops", "evaluate", "fastcore", "fire", "hf_transfer", "httpcore"),
            *("httpx", "immutabledict", "langdetect", "llvmlite", "numba", "posthog"),
            *("python-dotenv", "schedulefree", "termcolor", "zstandard", "wandb", "protobuf"),
            *("sentry-sdk", "gitpython", "gitdb", "smmap", "importlib-metadata", "zipp"),
            *("opentelemetry-api", "opentelemetry-sdk", "opentelemetry-proto"),
            *("opentelemetry-semantic-conventions", "opentelemetry-exporter-otlp-proto-http"),
            *("opentelemetry-exporter-otlp-proto-common", "googleapis-common-protos"),
        ),
        ("axolotl.cli.train", "axolotl.train"),
    ),
    "llamafactory": Environment(
        (
            *("llamafactory==0.9.5", "transformers==5.6.0", "trl==0.24.0", "accelerate==1.11.0"),
            *("peft==0.18.1", "datasets==4.0.0", "huggingface_hub==1.11.0", "tokenizers==0.22.2"),
            *("fsspec==2025.3.0", "antlr4-python3-runtime==4.9.3", "av", "docstring-parser"),
            *("einops", "eval_type_backport", "fire", "httpcore", "httpx", "modelscope"),
            *("modelscope-hub", "omegaconf", "sentencepiece", "shtab", "sse-starlette"),
            *("termcolor", "tiktoken", "tyro"),
        ),
        ("llamafactory.train.tuner",),
        ("torchaudio",),
    ),
    "swift": Environment(
        (
            *("ms-swift==4.6.0", "transformers==5.6.0", "trl==0.24.0", "accelerate==1.11.0"),
            *("peft==0.18.1", "datasets==4.8.4", "huggingface_hub==1.11.0", "tokenizers==0.22.2"),
            *("fsspec==2026.2.0", "addict", "attrdict", "binpacking", "cpm-kernels", "dacite"),
            *("einops", "httpcore", "httpx", "json-repair", "modelscope", "modelscope-hub"),
            *("nltk", "oss2", "rouge", "sentencepiece", "simplejson", "sortedcontainers"),
            *("termcolor", "tiktoken", "transformers-stream-generator", "zstandard"),
        ),
        ("swift.pipelines", "swift.callbacks.mapping"),
    ),
}


def python_of(stack: str, directory: Path = DEFAULT) -> Path:
    """The interpreter of a stack's environment, which may not be there."""
    return directory / stack / "bin/python"


def make_environment(stack: str, directory: Path = DEFAULT) -> str:
    """Makes the environment of one stack unless it is there.

    Returns:
        "" if it works, else the reason.
    """
    environment = ENVIRONMENTS[stack]
    python = python_of(stack, directory.absolute())
    if not python.exists():
        folder = python.parents[1]
        failure = _run([sys.executable, "-m", "venv", "--without-pip", folder])
        if failure:
            return failure
        packages = next(folder.glob("lib/python*/site-packages"))
        ours = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "zz_parent.pth").write_text("\n".join(ours) + "\n")
        for name in environment.stand_ins:
            (packages / f"{name}.py").write_text(f'"""Stands in for {name}: text needs none."""\n')
        command: list[str | Path] = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
        command += ["--disable-pip-version-check", "--upgrade", "--target", packages]
        failure = _run([*command, *environment.packages])
        if failure:
            return failure
    return _run([python, "-c", f"import {', '.join(environment.check)}"])


def _run(command: Sequence[str | Path]) -> str:
    """Runs a command; returns the last line of its errors, or ""."""
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = process.stderr.strip().splitlines() or [f"exit {process.returncode}"]
    return "" if process.returncode == 0 else lines[-1][:300]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, nargs="?", default=DEFAULT)
    directory = parser.parse_args().directory
    failures = {stack: make_environment(stack, directory) for stack in ENVIRONMENTS}
    for stack, failure in failures.items():
        print(f"{stack}: {failure or python_of(stack, directory)}")
    sys.exit(any(failures.values()))


if __name__ == "__main__":
    main()
