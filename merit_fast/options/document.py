"""Writes a section of options as YAML with their help texts: chosen ones, and defaults as comments.

A line ``# key: value`` becomes a setting when its ``# `` is removed.
"""

import textwrap
import typing
from collections.abc import Mapping
from typing import Any

import yaml

from merit_fast.options.fields import REQUIRED
from merit_fast.options.forms import help_text, words_of
from merit_fast.options.parser import to_plain
from merit_fast.records import Field, fields, record

_COLUMN = 40  # where the help texts begin
_WIDTH = 110


def flow(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(
        value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def option_lines(config: type[Any], chosen: Mapping[str, Any], indent: str = "  ") -> list[str]:
    """A line of every option that is chosen or has a default, each with its help text.

    Args:
        config: a record whose fields are declared by ``option``, except sections of it.
        chosen: values that are set; the others stand as comments with their defaults.
        indent: what every line begins with.
    """
    hints = typing.get_type_hints(config)
    lines = []
    for field in fields(config):
        is_chosen = field.name in chosen
        if "help" not in field.metadata or (field.default is REQUIRED and not is_chosen):
            continue
        if is_chosen:
            start = f"{indent}{field.name}: {flow(chosen[field.name])}"
        else:
            start = f"{indent}# {field.name}: {flow(_plain_default(field))}"
        words = field.metadata["choices"] or words_of(hints[field.name])
        lines += commented(start, help_text(field, words))
    return lines


def commented(start: str, text: str) -> list[str]:
    """The line with a comment, which continues on lines of its own."""
    comments = textwrap.wrap(text, _WIDTH - _COLUMN - 2, break_long_words=False)
    lines = [" " * _COLUMN + f"# {comment}" for comment in comments]
    if len(start) + 2 > _COLUMN:
        return [start, *lines]
    return [start + lines[0][len(start) :], *lines[1:]]


def _plain_default(field: Field) -> Any:
    @record
    class Holder:
        value: Any

    return to_plain(Holder(field.default))["value"]
