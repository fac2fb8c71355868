"""Makes command-line flags of the stages' config records: each help text exists once."""

import argparse
import importlib
import os
import re
import typing
from collections.abc import Callable
from typing import Any, NoReturn

from merit_fast.errors import InputError
from merit_fast.manifests.stages import Stage
from merit_fast.options.forms import flag_of, form_of, help_of
from merit_fast.options.keys import key_lines
from merit_fast.records import fields

Work = Callable[[argparse.Namespace], None]
_NO_TERMINAL = 80  # columns
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
EXAMPLE_YAML = """\
# my.yml; paths count from its folder
model: BASE
mixture:
  - {name: facts, path: facts.jsonl, eval_path: facts.eval.jsonl}
  - {name: code, path: code.parquet, eval_path: code.eval.parquet}
split: {groups: 2}
train: {epochs: 1, learning_rate: 2.0e-4}
output: runs/mine
"""


class _Formatter(argparse.HelpFormatter):
    """argparse's own one, told the terminal's columns: it would import shutil to find them."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)


def _columns() -> int:
    """Columns of the terminal, by COLUMNS or the terminal itself; 80 where there is none."""
    text = os.environ.get("COLUMNS", "")
    if text.isdecimal() and int(text) > 0:
        return int(text)
    try:
        return os.get_terminal_size(1).columns or _NO_TERMINAL
    except OSError:
        return _NO_TERMINAL


class Parser(argparse.ArgumentParser):
    """A command's parser: takes no abbreviations and raises InputError instead of exiting."""

    def __init__(self, command: str, purpose: str, example: str = "") -> None:
        super().__init__(
            f"merit-fast {command}",
            description=purpose,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )
        self.usage = "%(prog)s [options]"
        self.example = example  # one command line
        self.ending: Callable[[int], str] | None = None  # a longer text, of at most so many columns

    def add_positional(self, name: str, form: str, help: str, nargs: str | None = None) -> None:
        """Adds a positional argument and shows its form in the usage line."""
        self.usage = f"%(prog)s {form} [options]"
        self.add_argument(name, metavar=form, help=help, nargs=nargs)

    def format_help(self) -> str:
        """The help text, with an example and the command's longer text at its end."""
        text = super().format_help()
        if self.example:
            text += f"\nexample:\n  {self.example}\n"
        if self.ending:
            text += "\n" + self.ending(_columns() - 2)
        return text

    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}")


def add_inputs(parser: Parser) -> None:
    """Adds CONFIG.yml and ``section.key=value``, in any order."""
    help = "the run's YAML file, and values that override its keys"
    parser.add_positional("inputs", "[CONFIG.yml] [SECTION.KEY=VALUE ...]", help, nargs="*")


def add_upkeep(parser: Parser) -> None:
    """Adds the flags on finished outputs that ``run`` and the stages share."""
    parser.add_argument(
        "--verify", action="store_true", help="hash every file of the outputs and inputs"
    )
    help = "do not keep a trained branch that another one replaces in old/"
    parser.add_argument("--overwrite", action="store_true", help=help)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Adds flags of the top-level keys that every run needs."""
    add = parser.add_argument
    add("--model", metavar="MODEL", help="base model: directory or hub id (key `model`)")
    add(
        "--dataset",
        action="append",
        metavar="NAME=PATH[,EVAL_PATH]",
        help="one dataset and its held-out rows; repeat for each dataset (key `mixture`)",
    )
    add("--output", metavar="FOLDER", help="directory of all outputs (key `output`)")


def add_executor_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `run` that divide the run into units."""
    add = parser.add_argument
    add(
        "--executor",
        choices=("local", "ray", "submitit"),
        help="do the run's units at the same time: as processes here, on a Ray cluster, or as "
        "SLURM jobs",
    )
    add("--workers", type=int, metavar="N", help="units at a time [default: as many as fit]")
    add("--unit-threads", type=int, metavar="N", help="CPU threads of a unit")
    help = "processes of each training, started by torchrun, each on a GPU of its own [default: 1]"
    add("--unit-processes", type=int, metavar="N", help=help)
    add("--unit-gpus", type=int, metavar="N", help="GPUs of a unit on Ray or SLURM [default: 0]")
    help = (
        "end a unit that takes longer, as 90m, 12h or 2d, and start it again, as one that dies "
        "[default: no limit]"
    )
    add("--unit-limit", metavar="TIME", help=help)
    help = (
        "of the executor: address of Ray; cluster, folder and the options of submitit, such as "
        "slurm_partition; repeat for each"
    )
    add("--executor-option", action="append", metavar="KEY=VALUE", help=help)


def check_executor_flags(arguments: argparse.Namespace) -> None:
    """Refuses flags of units where nothing reads them, and numbers below 1.

    Raises:
        InputError: a flag breaks a rule.
    """
    numbers = {
        "--workers": arguments.workers,
        "--unit-threads": arguments.unit_threads,
        "--unit-processes": arguments.unit_processes,
        "--unit-gpus": arguments.unit_gpus,
    }
    given = {**numbers, "--executor-option": arguments.executor_option}
    given |= {"--storage": arguments.storage, "--scratch": arguments.scratch}
    given |= {"--unit-limit": arguments.unit_limit}
    for flag, value in given.items():
        if value is not None and arguments.executor is None:
            raise InputError(f"command line: {flag}: goes with --executor, which is not given")
    for flag, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"command line: {flag}: must be at least 1, got {number}")
    limit = arguments.unit_limit
    if limit is not None and read_seconds("--unit-limit", limit) <= 0:
        raise InputError(f"command line: --unit-limit: must be above 0, got {limit}")
    if arguments.executor is not None and (arguments.rounds != 1 or arguments.overwrite):
        flag = "--overwrite" if arguments.overwrite else f"--rounds {arguments.rounds}"
        raise InputError(f"command line: --executor: does not go with {flag}")


def read_seconds(flag: str, text: str) -> float:
    """Seconds of a time such as 45s, 90m, 12h or 2d.

    Raises:
        InputError: it has another form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None:
        rule = "must be a number and s, m, h or d, as in 2h"
        raise InputError(f"command line: {flag}: {rule}, got {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


def run_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The top-level keys that the flags of ``add_run_flags`` set."""
    flags = {
        "model": arguments.model,
        "output": arguments.output,
        "mixture": mixture_of(arguments.dataset),
    }
    return {key: value for key, value in flags.items() if value is not None}


def help_of_keys(width: int) -> str:
    """Every key of a run's YAML in at most ``width`` columns, and an example at the end."""
    from merit_fast.pipeline.config import RunConfig

    lines = ["keys of CONFIG.yml:", *key_lines(RunConfig, width), ""]
    lines.append("an example of CONFIG.yml (merit-fast init writes one for your files):")
    lines += ["  " + line for line in EXAMPLE_YAML.splitlines()]
    return "\n".join(lines) + "\n"


def add_fields(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """Adds a flag for every field: ``--max-shard-size TEXT``, ``--fsync/--no-fsync`` for a bool.

    Values are YAML. A field without a flag (``option(flag="")``, or a list of mappings that names
    no flag) is set only in YAML or by KEY=VALUE.
    """
    hints = typing.get_type_hints(config)
    for field in fields(config):
        flag = flag_of(field, hints[field.name])
        if not flag:
            continue
        form, words = form_of(field, hints[field.name])
        kind: dict[str, Any] = {"metavar": form}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        help = help_of(field, words).replace("%", "%%")
        parser.add_argument(flag, dest=field.name, default=None, help=help, **kind)


def assignments_of(arguments: argparse.Namespace, config: type[Any], prefix: str = "") -> list[str]:
    """The flags on the command line as ``key=value`` in YAML."""
    assignments = []
    for field in fields(config):
        value = getattr(arguments, field.name, None)
        if value is not None:
            text = str(value).lower() if isinstance(value, bool) else value
            assignments.append(f"{prefix}{field.name}={text}")
    return assignments


def mixture_of(datasets: list[str] | None) -> list[dict[str, str]] | None:
    """Entries of ``mixture:`` from ``--dataset NAME=PATH`` or ``NAME=PATH,EVAL_PATH``."""
    if not datasets:
        return None
    mixture = []
    for text in datasets:
        name, paths = _named(text, "--dataset", "NAME=PATH or NAME=PATH,EVAL_PATH")
        path, _, eval_path = paths.partition(",")
        entry = {"name": name, "path": path}
        if eval_path:
            entry["eval_path"] = eval_path
        mixture.append(entry)
    return mixture


def rows_of(words: list[str]) -> tuple[list[dict[str, str]], list[str]]:
    """Entries of ``mixture:`` from ``--validation NAME=PATH``; KEY=VALUE of ``data.KEY=VALUE``."""
    options = [text.removeprefix("data.") for text in words if text.startswith("data.")]
    datasets = [text for text in words if not text.startswith("data.")]
    if not datasets:
        raise InputError("command line: --validation: must be NAME=PATH too, got data options only")
    named = (_named(text, "--validation", "NAME=PATH") for text in datasets)
    return [{"name": name, "path": path} for name, path in named], options


def _named(text: str, flag: str, form: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not path.strip(","):
        raise InputError(f"command line: {flag}: must be {form}, got {text!r}")
    return name, path


def options_of(stage: Stage) -> type[Any]:
    """The class of a stage's options."""
    module, _, name = stage.options.partition(":")
    options: type[Any] = getattr(importlib.import_module(module), name)
    return options
