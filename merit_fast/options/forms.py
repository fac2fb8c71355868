"""Shows options to people: the form of a value, its default and its help text, without Python."""

import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, Union

from merit_fast.records import MISSING, Field, fields, is_record

_LONGEST_FORM = 60  # columns of a value's form; longer lists of words go into the help text
_SCALARS: dict[Any, str] = {int: "N", float: "NUMBER", str: "TEXT", bool: "true|false"}


def flag_of(field: Field, hint: Any) -> str:
    """The command-line flag of a field; "": it has none."""
    named: str | None = field.metadata.get("flag")
    if named is not None:
        return named
    return "" if is_list_of_mappings(hint) else "--" + field.name.replace("_", "-")


def form_of(field: Field, hint: Any) -> tuple[str, Sequence[str]]:
    """The value's form, such as N or {fast,slow}, and words that the help text must list."""
    if field.metadata.get("form"):
        return field.metadata["form"], field.metadata.get("choices", ())
    words = field.metadata.get("choices") or words_of(hint)
    alternatives = list(words) if field.metadata.get("choices") else _alternatives(hint)
    form = "|".join(alternatives)
    if words and alternatives == list(words):
        form = "{" + ",".join(words) + "}"
    if len(form) <= _LONGEST_FORM:
        return form, ()
    return field.name.upper().replace("_", "-"), words


def help_of(field: Field, words: Sequence[str]) -> str:
    """The help text with the words that it must list, and the default."""
    help = help_text(field, words)
    default = shown(field.default)
    return f"{help} [default: {default}]" if default else help


def help_text(field: Field, words: Sequence[str]) -> str:
    """The help text with the words that it must list."""
    help: str = field.metadata["help"]
    return help if all(word in help for word in words) else f"{help}; one of {', '.join(words)}"


def shown(default: Any) -> str:
    """A default for people; "" for None and for fields without a default."""
    if default is None or default is MISSING:
        return ""
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, float):
        return f"{default:g}"
    if isinstance(default, (tuple, list)):
        return ", ".join(shown(value) for value in default) or "none"
    if is_record(default):
        values = {f.name: getattr(default, f.name) for f in fields(default)}
        parts = [f"{name}: {shown(value)}" for name, value in values.items() if value]
        return ", ".join(parts) or "none"
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


def words_of(hint: Any) -> list[str]:
    """Words of every Literal in an annotation."""
    if typing.get_origin(hint) is Literal:
        return [str(word) for word in typing.get_args(hint)]
    return [word for inner in typing.get_args(hint) for word in words_of(inner)]


def is_list_of_mappings(hint: Any) -> bool:
    """Whether an annotation is a list of records."""
    arguments = typing.get_args(hint)
    return typing.get_origin(hint) is tuple and is_record(arguments[0])
