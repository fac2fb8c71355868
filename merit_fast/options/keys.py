"""Lists the keys of a config for people, section by section."""

import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from merit_fast.options.forms import form_of, help_of
from merit_fast.records import MISSING, Field, fields, is_record

_COLUMN = 30  # where the help texts begin


def key_lines(config: type[Any], width: int) -> list[str]:
    """Every key of a config by section, with form, help text and default, in ``width`` columns."""
    lines = []
    for section, keys in sections(config):
        lines.append(f"  {section or 'top level'}:")
        for name, form, help in keys:
            lines += _entry(f"    {name} {form}", help, max(width, _COLUMN + 30))
    return lines


def sections(config: type[Any]) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Sections of a config with (key, form, help) of their keys; "" names the top."""
    hints = typing.get_type_hints(config)
    listed = fields(config)
    yield "", [_key(field, hints[field.name]) for field in listed if "help" in field.metadata]
    for field in listed:
        hint = hints[field.name]
        if is_record(hint):
            yield field.name, list(_keys(hint, ""))
        elif typing.get_origin(hint) is tuple and is_record(hint.__args__[0]):
            yield f"{field.name}, each entry", list(_keys(hint.__args__[0], ""))


def _keys(config: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    hints = typing.get_type_hints(config)
    for field in fields(config):
        hint = hints[field.name]
        inner = fields(hint) if is_record(hint) else ()
        if inner and all("help" in item.metadata for item in inner):
            yield from _keys(hint, f"{prefix}{field.name}.")
        else:
            name, form, help = _key(field, hint)
            yield prefix + name, form, help


def _key(field: Field, hint: Any) -> tuple[str, str, str]:
    form, words = form_of(field, hint)
    missing = field.default is MISSING and field.default_factory is MISSING
    return field.name, form, help_of(field, words) + (" [required]" if missing else "")


def _entry(start: str, help: str, width: int) -> list[str]:
    lines = textwrap.wrap(help, width - _COLUMN, break_long_words=False, break_on_hyphens=False)
    if len(start) + 2 > _COLUMN:
        return [start, *(" " * _COLUMN + line for line in lines)]
    return [start.ljust(_COLUMN) + lines[0], *(" " * _COLUMN + line for line in lines[1:])]
