"""Arguments of the command line from the stages' config dataclasses: each help text exists once."""

import argparse
import dataclasses
from typing import Any, NoReturn

from merit_fast.errors import InputError


class Parser(argparse.ArgumentParser):
    """A command's parser: no abbreviations, and what it refuses is an InputError."""

    def __init__(self, command: str, help: str) -> None:
        super().__init__(f"merit-fast {command}", description=help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}")


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """CONFIG.yml and ``section.key=value``, in any order."""
    help = "CONFIG.yml and section.key=value overrides"
    parser.add_argument("inputs", nargs="*", metavar="CONFIG [KEY=VALUE]", help=help)


def add_fields(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """One flag for every field: ``--max-shard-size VALUE`` in YAML, ``--fsync/--no-fsync`` for a truth value."""
    for field in dataclasses.fields(config):
        shown = list(field.default) if isinstance(field.default, tuple) else field.default
        flag, help = (
            "--" + field.name.replace("_", "-"),
            f"{field.metadata['help']} [default: {shown}]",
        )
        kind: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction} if isinstance(field.default, bool) else {}
        )
        parser.add_argument(
            flag, dest=field.name, default=None, help=help.replace("%", "%%"), **kind
        )


def assignments_of(arguments: argparse.Namespace, config: type[Any], prefix: str = "") -> list[str]:
    """The flags that were given, as ``key=value`` in YAML."""
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(config)}
    shown = {
        key: str(value).lower() if isinstance(value, bool) else value
        for key, value in given.items()
    }
    return [f"{prefix}{key}={value}" for key, value in shown.items() if value is not None]


def mixture_of(datasets: list[str] | None) -> list[dict[str, str]] | None:
    """Entries of ``mixture:`` from ``--dataset NAME=PATH`` or ``NAME=PATH,EVAL_PATH``."""
    if not datasets:
        return None
    mixture = []
    for text in datasets:
        name, paths = _named(text, "--dataset", "NAME=PATH or NAME=PATH,EVAL_PATH")
        path, _, eval_path = paths.partition(",")
        mixture.append(
            {"name": name, "path": path, **({"eval_path": eval_path} if eval_path else {})}
        )
    return mixture


def rows_of(datasets: list[str]) -> list[dict[str, str]]:
    """Entries of ``mixture:`` from ``--validation NAME=PATH``."""
    named = (_named(text, "--validation", "NAME=PATH") for text in datasets)
    return [{"name": name, "path": path} for name, path in named]


def _named(text: str, flag: str, form: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not path.strip(","):
        raise InputError(f"command line: {flag}: must be {form}, got {text!r}")
    return name, path
