"""The rows of the merge benchmark: their commands, and the files to cache before them."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.merge import mergekit_env
from bench.merge.checkpoints import weight_files

ROOT = Path(__file__).resolve().parents[2]
WRITES = {
    "write": "buffered, fsync",
    "write-allocated": "`posix_fallocate`, buffered, fsync",
    "write-early": "buffered, write-back asked every 8 MiB, fsync",
    "write-direct": "O_DIRECT, fsync",
}
READS = {
    "read-512k": "512 KiB pieces",
    "read-8m": "8 MiB pieces",
    "read-8m-2": "8 MiB pieces, 2 threads",
}
GROUPS = ("linear", "startup", "cold", "ties", "slerp")


@dataclass(frozen=True)
class Setup:
    """The inputs and folders of one benchmark, and mergekit's interpreter if there is one."""

    base: Path
    models: tuple[Path, ...]
    small: tuple[Path, ...]  # the same models in a size that takes no time, to warm a process up
    scratch: Path
    mergekit: Path | None

    @property
    def out(self) -> Path:
        return self.scratch / "out"

    @functools.cached_property
    def num_bytes(self) -> int:
        """The bytes of one output's weight files."""
        return sum(file.stat().st_size for file in weight_files(self.models[0]))

    @functools.cached_property
    def has_no_fsync(self) -> bool:
        """Whether this version's command has the option --no-fsync."""
        command = [str(merit_fast()), "merge", "--help"]
        wide = {**os.environ, "COLUMNS": "200"}
        process = subprocess.run(command, capture_output=True, text=True, check=True, env=wide)
        return "--no-fsync" in process.stdout

    @property
    def offline(self) -> dict[str, str]:
        return {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Row:
    """One contender or floor of a group."""

    name: str
    label: str
    command: Callable[[], Sequence[str | Path]]
    inputs: Sequence[Path] = ()  # in the page cache before the run; out of it if cold
    cold: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = ROOT
    slow: bool = False  # runs in the first rounds only
    kept: bool = False  # the first round's output is compared later
    inner: bool = False  # only its own figure counts: a floor, or a process that warmed up first


def merit_fast() -> Path:
    """The console script of this environment."""
    return Path(sys.executable).with_name("merit-fast")


def merge_command(
    setup: Setup,
    flags: Sequence[str] = (),
    weights: Sequence[float] = (),
    models: Sequence[Path] = (),
    fsync: bool = False,
) -> list[str | Path]:
    """The command line of a merge, with uniform weights by default, and no fsync if possible."""
    command: list[str | Path] = [merit_fast(), "merge", setup.out, "--json", *flags]
    if not fsync and setup.has_no_fsync:
        command.append("--no-fsync")
    models = models or setup.models
    if not weights:
        command += ["--weights", "uniform"]
    for number, model in enumerate(models):
        command += ["--model", f"{model}:{weights[number]}" if weights else str(model)]
    return command


def mergekit_command(
    setup: Setup,
    method: str,
    models: Sequence[Path],
    weights: Sequence[float] = (),
    base: Path | None = None,
    **shared: float,
) -> list[str | Path]:
    """The command line of the same merge by mergekit; writes its recipe."""
    assert setup.mergekit is not None
    config = setup.scratch / f"{method}.yml"
    config.write_text(mergekit_env.config(method, models, weights, base, **shared))
    return [setup.mergekit.with_name("mergekit-yaml"), config, setup.out, *mergekit_env.OPTIONS]


def rows(setup: Setup) -> dict[str, list[Row]]:
    """The rows by group; rows of a group are compared with each other and run in turn."""
    groups = {
        "linear": _linear(setup),
        "startup": _startup(setup),
        "cold": _cold(setup),
        "ties": _method(
            setup, "ties", ["--density", "0.5", "--base", str(setup.base)], setup.models, setup.base
        ),
        "slerp": _method(setup, "slerp", ["--t", "0.5"], setup.models[:2], setup.models[0]),
    }
    return {
        name: [row for row in group if setup.mergekit or "mergekit" not in row.name]
        for name, group in groups.items()
    }


def _program(setup: Setup, name: str) -> Callable[[], list[str | Path]]:
    return lambda: [sys.executable, "-m", "bench.merge.contenders", name, setup.out, *setup.models]


def _floor(setup: Setup, name: str) -> Callable[[], list[str | Path]]:
    return lambda: [
        sys.executable,
        "-m",
        "bench.merge.floors",
        name,
        setup.out,
        str(setup.num_bytes),
        *setup.models,
    ]


def _linear(setup: Setup) -> list[Row]:
    inputs = weight_files(*setup.models)
    four = [1.0] * len(setup.models)
    note = "" if setup.has_no_fsync else " (no --no-fsync here: with fsync)"

    def inner() -> list[str | Path]:
        assert setup.mergekit is not None
        small = setup.scratch / "small.yml"
        large = setup.scratch / "large.yml"
        small.write_text(mergekit_env.config("linear", setup.small, four))
        large.write_text(mergekit_env.config("linear", setup.models, four))
        warm_up = setup.scratch / "out-small"
        return [setup.mergekit, "-P", "-c", mergekit_env.DRIVER, small, warm_up, large, setup.out]

    quiet: dict[str, Any] = {"environment": setup.offline, "folder": setup.scratch}
    return [
        Row("command", f"`merit-fast merge`, no fsync{note}", lambda: merge_command(setup), inputs),
        Row(
            "command-fsync", "`merit-fast merge`", partial(merge_command, setup, fsync=True), inputs
        ),
        Row("library", f"`merge_models`, no fsync{note}", _program(setup, "library"), inputs),
        Row("library-fsync", "`merge_models`", _program(setup, "library-fsync"), inputs),
        Row(
            "mergekit",
            "`mergekit-yaml`, no fsync",
            lambda: mergekit_command(setup, "linear", setup.models, four),
            inputs,
            **quiet,
        ),
        Row("mergekit-inner", "mergekit `run_merge`, no fsync", inner, inputs, inner=True, **quiet),
        Row("safetensors", "`safetensors` loop, no fsync", _program(setup, "safetensors"), inputs),
        Row(
            "transformers",
            "transformers: load, average, save",
            _program(setup, "transformers"),
            inputs,
            environment=setup.offline,
        ),
        *_linear_floors(setup, inputs),
    ]


def _linear_floors(setup: Setup, inputs: list[Path]) -> list[Row]:
    return [
        Row(
            "memory",
            "memory traffic: inputs once, output twice",
            _floor(setup, "memory"),
            inner=True,
        ),
        Row(
            "page-cache",
            "page cache: `pread` all, `pwrite` all",
            _floor(setup, "page-cache"),
            inputs,
            inner=True,
        ),
        *(
            Row(name, f"durable write: output once, {how}", _floor(setup, name), inner=True)
            for name, how in WRITES.items()
        ),
    ]


def _startup(setup: Setup) -> list[Row]:
    python = sys.executable
    theirs = setup.mergekit or Path("absent")
    quiet: dict[str, Any] = {"environment": setup.offline, "folder": setup.scratch}
    return [
        Row("python", "`python -c pass`", lambda: [python, "-c", "pass"]),
        Row(
            "import", "`import merit_fast.merge`", lambda: [python, "-c", "import merit_fast.merge"]
        ),
        Row("help", "`merit-fast --help`", lambda: [merit_fast(), "--help"]),
        Row("merge-help", "`merit-fast merge --help`", lambda: [merit_fast(), "merge", "--help"]),
        Row(
            "mergekit-import",
            "`import mergekit.merge`",
            lambda: [theirs, "-c", "import mergekit.merge"],
            **quiet,
        ),
        Row(
            "mergekit-help",
            "`mergekit-yaml --help`",
            lambda: [theirs.with_name("mergekit-yaml"), "--help"],
            **quiet,
        ),
    ]


def _cold(setup: Setup) -> list[Row]:
    cold = partial(Row, inputs=weight_files(*setup.models), cold=True)
    weights = [1.0] * len(setup.models)
    return [
        cold("command", "`merit-fast merge`, no fsync", partial(merge_command, setup)),
        cold("command-fsync", "`merit-fast merge`", partial(merge_command, setup, fsync=True)),
        cold("library", "`merge_models`, no fsync", _program(setup, "library")),
        *(
            cold(name, f"disk read: inputs once, {how}", _floor(setup, name), inner=True)
            for name, how in READS.items()
        ),
        cold(
            "mergekit",
            "`mergekit-yaml`, no fsync",
            partial(mergekit_command, setup, "linear", setup.models, weights),
            environment=setup.offline,
            folder=setup.scratch,
            slow=True,
        ),
    ]


def _method(
    setup: Setup, method: str, flags: list[str], models: Sequence[Path], base: Path
) -> list[Row]:
    inputs = weight_files(*{*models, base})
    shared = {"t": 0.5} if method == "slerp" else {"density": 0.5}
    weights = [] if method == "slerp" else [1.0] * len(models)
    return [
        Row(
            "command",
            f"`merit-fast merge --method {method}`, no fsync",
            partial(merge_command, setup, ["--method", method, *flags], models=models),
            inputs,
            kept=True,
        ),
        Row(
            "mergekit",
            f"`mergekit-yaml` {method}, no fsync",
            partial(mergekit_command, setup, method, models, weights, base, **shared),
            inputs,
            environment=setup.offline,
            folder=setup.scratch,
            slow=True,
            kept=True,
        ),
    ]
