"""Strict parsing of plain mappings into the stages' frozen dataclasses, and the way back.

A config is a frozen dataclass whose fields carry their help text: ``groups: int = option(4, "number of groups")``.
Unknown keys are errors that name the nearest valid one; values are checked against the field's annotation.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from merit_fast.errors import InputError, show

T = TypeVar("T")


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text; ``default`` may be a list or tuple (stored as a tuple)."""
    if isinstance(default, list):
        default = tuple(default)
    return dataclasses.field(default=default, metadata={"help": help})


def parse(cls: type[T], values: Any, where: str, key: str = "") -> T:
    """Builds the frozen dataclass ``cls`` from a mapping.

    Args:
        cls: a dataclass type.
        values: the mapping found in the file; None counts as empty.
        where: the file (or "command line") to name in errors.
        key: the dotted key of this mapping in the file, "" at the top.

    Raises:
        InputError: unknown key, missing key, or a value of the wrong type.
    """
    values = {} if values is None else values
    label = key or "the top level"
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: {label}: must be a mapping of keys, got {show(values)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise InputError(
                f"{where}: {_join(key, name)}: unknown key{_nearest(str(name), fields)}"
            )
    hints = typing.get_type_hints(cls)
    parsed = {
        name: _coerce(hints[name], value, where, _join(key, name)) for name, value in values.items()
    }
    for name, field in fields.items():
        absent = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if name not in parsed and absent:
            raise InputError(f"{where}: {_join(key, name)}: is required")
    try:
        return cls(**parsed)
    except InputError as error:  # a rule that the dataclass checks itself
        raise InputError(f"{where}: {_join(key, '')}{error}") from None


def require(holds: bool, key: str, rule: str, value: Any) -> None:
    """For ``__post_init__``: the rule of one field. ``parse`` puts file and section in front."""
    if not holds:
        raise InputError(f"{key}: must be {rule}, got {show(value)}")


def to_plain(config: Any) -> dict[str, Any]:
    """The dataclass as JSON-ready data; ``parse(type(config), to_plain(config), ...)`` gives it back.

    A field whose metadata says ``omit_default`` is left out while it has its default.
    """
    plain: dict[str, Any] = json.loads(json.dumps(_plain(config)))
    return plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {
            field.name: _plain(item)
            for field, item in fields
            if not (field.metadata.get("omit_default") and item == field.default)
        }
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Applies ``section.key=value`` strings (values in YAML) to a copy of a nested mapping.

    Raises:
        InputError: a string without "=", or a path through something that is no mapping.
    """
    import yaml

    result: dict[str, Any] = json.loads(json.dumps(values))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise InputError(f"command line: {assignment!r}: must have the form section.key=value")
        *parents, last = path.split(".")
        node = result
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise InputError(f"command line: {path}: {parent} is not a section")
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"command line: {path}: {text!r} is not a YAML value") from None
    return result


def _coerce(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, where, key)
    if origin in (Union, types.UnionType):
        return _coerce_union(arguments, value, where, key)
    if origin is Literal:
        if value in arguments and type(value) in {type(choice) for choice in arguments}:
            return value
        choices = ", ".join(str(choice) for choice in arguments)
        raise InputError(f"{where}: {key}: must be one of {choices}, got {show(value)}")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}: {key}: must be a list, got {show(value)}")
        hints = arguments[:1] * len(value) if Ellipsis in arguments else arguments
        if len(hints) != len(value):
            raise InputError(f"{where}: {key}: must be a list of {len(hints)}, got {show(value)}")
        return tuple(_coerce(hints[i], v, where, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {key}: must be a mapping, got {show(value)}")
        return {str(k): _coerce(arguments[1], v, where, _join(key, k)) for k, v in value.items()}
    if hint is Any:
        return value
    if (
        hint is float
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) < 1e308
    ):
        return float(value)
    if hint is float and isinstance(value, float):
        return value  # infinities and NaN are for the field's own rule
    if hint is float and isinstance(value, str) and _is_number(value):
        return float(value)  # YAML 1.1 reads 2e-4 (no dot) as a string
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and (hint is bool or not isinstance(value, bool))
    ):
        return value
    kind = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}.get(
        hint, str(hint)
    )
    raise InputError(f"{where}: {key}: must be {kind}, got {show(value)}")


def _coerce_union(choices: Sequence[Any], value: Any, where: str, key: str) -> Any:
    if value is None and type(None) in choices:
        return None
    errors = []
    for choice in choices:
        if choice is not type(None):
            try:
                return _coerce(choice, value, where, key)
            except InputError as error:
                errors.append(error)
    rules = " or ".join(
        str(error).split(": must be ", 1)[-1].split(", got ")[0] for error in errors
    )
    raise InputError(f"{where}: {key}: must be {rules}, got {show(value)}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _nearest(name: str, valid: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid keys: {', '.join(valid)}"
