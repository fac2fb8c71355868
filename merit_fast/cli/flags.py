"""Makes command-line flags of the stages' config dataclasses: each help text exists once."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Union

from merit_fast.errors import InputError

_LONGEST_FORM = 60  # columns of a value's form in --help; longer lists of words go into the text
_SCALARS: dict[Any, str] = {int: "N", float: "NUMBER", str: "TEXT", bool: "true|false"}


class Parser(argparse.ArgumentParser):
    """A command's parser: takes no abbreviations and raises InputError instead of exiting."""

    def __init__(self, command: str, purpose: str) -> None:
        super().__init__(f"merit-fast {command}", description=purpose, allow_abbrev=False)
        self.usage = "%(prog)s [options]"

    def add_positional(self, name: str, form: str, help: str, nargs: str | None = None) -> None:
        """Adds a positional argument and shows its form in the usage line."""
        self.usage = f"%(prog)s {form} [options]"
        self.add_argument(name, metavar=form, help=help, nargs=nargs)

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


def add_fields(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """Adds a flag for every field: ``--max-shard-size TEXT``, ``--fsync/--no-fsync`` for a bool.

    Values are YAML. A field without a flag (``option(flag="")``, or a list of mappings that names
    no flag) is set only in YAML or by KEY=VALUE.
    """
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        flag = _flag(field, hints[field.name])
        if not flag:
            continue
        form, words = _form(field, hints[field.name])
        kind: dict[str, Any] = {"metavar": form}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        help = _help(field, words).replace("%", "%%")
        parser.add_argument(flag, dest=field.name, default=None, help=help, **kind)


def assignments_of(arguments: argparse.Namespace, config: type[Any], prefix: str = "") -> list[str]:
    """The flags on the command line as ``key=value`` in YAML."""
    assignments = []
    for field in dataclasses.fields(config):
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


def rows_of(datasets: list[str]) -> list[dict[str, str]]:
    """Entries of ``mixture:`` from ``--validation NAME=PATH``."""
    named = (_named(text, "--validation", "NAME=PATH") for text in datasets)
    return [{"name": name, "path": path} for name, path in named]


def _named(text: str, flag: str, form: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not path.strip(","):
        raise InputError(f"command line: {flag}: must be {form}, got {text!r}")
    return name, path


# ---- the help of one field
def _flag(field: "dataclasses.Field[Any]", hint: Any) -> str:
    named: str | None = field.metadata.get("flag")
    if named is not None:
        return named
    return "" if _is_list_of_mappings(hint) else "--" + field.name.replace("_", "-")


def _form(field: "dataclasses.Field[Any]", hint: Any) -> tuple[str, Sequence[str]]:
    """The value's form in ``--help``, and words that the help text must list instead."""
    if field.metadata.get("form"):
        return field.metadata["form"], field.metadata.get("choices", ())
    words = field.metadata.get("choices") or _words(hint)
    alternatives = list(words) if field.metadata.get("choices") else _alternatives(hint)
    form = "|".join(alternatives)
    if words and alternatives == list(words):
        form = "{" + ",".join(words) + "}"
    if len(form) <= _LONGEST_FORM:
        return form, ()
    return field.name.upper().replace("_", "-"), words


def _help(field: "dataclasses.Field[Any]", words: Sequence[str]) -> str:
    help: str = field.metadata["help"]
    if not all(word in help for word in words):
        help += f"; one of {', '.join(words)}"
    default = _shown(field.default)
    return f"{help} [default: {default}]" if default else help


def _shown(default: Any) -> str:
    """A default for people; "" for None and for fields without a default."""
    if default is None or default is dataclasses.MISSING:
        return ""
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, float):
        return f"{default:g}"
    if isinstance(default, (tuple, list)):
        return ", ".join(_shown(value) for value in default) or "none"
    if dataclasses.is_dataclass(default):
        values = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
        shown = [f"{name}: {_shown(value)}" for name, value in values.items() if value]
        return ", ".join(shown) or "none"
    return str(default)


def _alternatives(hint: Any) -> list[str]:
    """The forms that an annotation accepts, without None."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (Union, types.UnionType):
        forms = [form for choice in arguments for form in _alternatives(choice)]
        return list(dict.fromkeys(forms))
    if origin is Literal:
        return [str(word) for word in arguments]
    if hint is type(None):
        return []
    if origin is tuple:
        inner = _alternatives(arguments[0])
        if inner == ["YAML"] or inner[0].startswith("["):
            return ["YAML"]
        return [f"[{'|'.join(inner)},...]"]
    return [_SCALARS.get(hint, "YAML")]


def _words(hint: Any) -> list[str]:
    """Words of every Literal in an annotation."""
    if typing.get_origin(hint) is Literal:
        return [str(word) for word in typing.get_args(hint)]
    return [word for inner in typing.get_args(hint) for word in _words(inner)]


def _is_list_of_mappings(hint: Any) -> bool:
    arguments = typing.get_args(hint)
    return typing.get_origin(hint) is tuple and dataclasses.is_dataclass(arguments[0])
