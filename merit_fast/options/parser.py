"""Reads plain mappings strictly into records, and writes them back.

Unknown keys are errors that name the nearest valid key. Every value is checked against the
annotation of its field.
"""

import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from merit_fast.errors import InputError, show
from merit_fast.records import MISSING, Field, fields, is_record

T = TypeVar("T")

_SCALARS = frozenset({int, float, str, bool, type(None)})
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")  # the same in JSON and YAML
_WORD = re.compile("[A-Za-z][A-Za-z0-9_]*")
# Words that YAML reads as something else than a text, in any case.
NO_TEXTS = frozenset({"true", "false", "yes", "no", "on", "off", "y", "n", "null"})
_KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def parse(cls: type[T], values: Any, where: str, key: str = "") -> T:
    """Builds the record ``cls`` from a mapping.

    Args:
        cls: a record's class, or a dataclass.
        values: the mapping in the file; None counts as empty.
        where: the file (or "command line") to name in errors.
        key: the dotted key of this mapping in the file, "" at the top.

    Raises:
        InputError: unknown key, missing key, or a value of the wrong type.
    """
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        label = key or "the top level"
        raise InputError(f"{where}: {label}: must be a mapping of keys, got {show(values)}")
    known = {field.name: field for field in fields(cls)}
    for name in values:
        if name not in known:
            nearest = _nearest(str(name), known)
            raise InputError(f"{where}: {_join(key, name)}: unknown key{nearest}")
    hints = typing.get_type_hints(cls)
    parsed = {
        name: _convert(hints[name], _spelled(known[name], value), where, _join(key, name))
        for name, value in values.items()
    }
    for name, field in known.items():
        if name not in parsed and _is_required(field):
            raise InputError(f"{where}: {_join(key, name)}: is required")
    try:
        return cls(**parsed)
    except InputError as error:  # a rule that the record checks itself
        raise InputError(f"{where}: {_join(key, '')}{error}") from None


def to_plain(config: Any) -> dict[str, Any]:
    """The record as JSON-ready data, which ``parse`` turns into an equal record.

    A field declared with ``omit_default`` is left out while it has its default.
    """
    plain: dict[str, Any] = json.loads(json.dumps(_plain(config)))
    return plain


def _plain(value: Any) -> Any:
    if is_record(value):
        items = ((field, getattr(value, field.name)) for field in fields(value))
        return {
            field.name: _plain(item)
            for field, item in items
            if not (field.metadata.get("omit_default") and item == field.default)
        }
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    if _SCALARS.issuperset(map(type, value)):  # a row of a matrix, of which there may be thousands
        return list(value)
    return [_plain(item) for item in value]


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Applies ``section.key=value`` strings (values in YAML) to a copy of a nested mapping.

    Raises:
        InputError: a string without "=", or a path through a value that is no mapping.
    """
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
        node[last] = _yaml_value(text, path)
    return result


def _yaml_value(text: str, path: str) -> Any:
    """The value of one line of YAML; plain words, numbers, true and false need no import."""
    if text in ("true", "false"):
        return text == "true"
    if _NUMBER.fullmatch(text):
        return json.loads(text)
    if _WORD.fullmatch(text) and text.lower() not in NO_TEXTS:
        return text
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        raise InputError(f"command line: {path}: {show(text)} is not a YAML value") from None


def _spelled(field: Field, value: Any) -> Any:
    """The value by the field's own word, where it is one of the field's other ``spellings``."""
    spellings = field.metadata.get("spellings") or {}
    return spellings.get(value, value) if isinstance(value, str) else value


# ---- one value, by the kind of its annotation
def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    origin = typing.get_origin(hint)
    if is_record(hint):
        return parse(typing.cast(type, hint), value, where, key)
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, where, key)
    if origin is Literal:
        return _check_choice(typing.get_args(hint), value, where, key)
    if origin is tuple:
        return _convert_list(typing.get_args(hint), value, where, key)
    if origin is dict:
        return _convert_mapping(typing.get_args(hint)[1], value, where, key)
    if hint is Any:
        return value
    return _convert_scalar(hint, value, where, key)


def _convert_union(choices: Sequence[Any], value: Any, where: str, key: str) -> Any:
    if value is None and type(None) in choices:
        return None
    mappings = [choice for choice in choices if _is_mapping(choice)]
    if isinstance(value, Mapping) and len(mappings) == 1:
        return _convert(mappings[0], value, where, key)  # its errors name the inner key
    errors = []
    for choice in choices:
        if choice is not type(None):
            try:
                return _convert(choice, value, where, key)
            except InputError as error:
                errors.append(error)
    rules = " or ".join(
        str(error).split(": must be ", 1)[-1].split(", got ")[0] for error in errors
    )
    raise InputError(f"{where}: {key}: must be {rules}, got {show(value)}")


def _is_mapping(hint: Any) -> bool:
    return is_record(hint) or typing.get_origin(hint) is dict


def _check_choice(choices: Sequence[Any], value: Any, where: str, key: str) -> Any:
    if value in choices and type(value) in {type(choice) for choice in choices}:
        return value
    words = ", ".join(str(choice) for choice in choices)
    raise InputError(f"{where}: {key}: must be one of {words}, got {show(value)}")


def _convert_list(hints: Sequence[Any], value: Any, where: str, key: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: {key}: must be a list, got {show(value)}")
    if Ellipsis in hints:
        hints = [hints[0]] * len(value)
    if len(hints) != len(value):
        raise InputError(f"{where}: {key}: must be a list of {len(hints)}, got {show(value)}")
    return tuple(_convert(hints[i], v, where, f"{key}[{i}]") for i, v in enumerate(value))


def _convert_mapping(hint: Any, value: Any, where: str, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {key}: must be a mapping, got {show(value)}")
    return {str(name): _convert(hint, v, where, _join(key, name)) for name, v in value.items()}


def _convert_scalar(hint: Any, value: Any, where: str, key: str) -> Any:
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, int) and not is_bool and abs(value) < 1e308:
        return float(value)
    if hint is float and isinstance(value, str) and _is_number(value):
        return float(value)  # YAML 1.1 reads 2e-4 (no dot) as a string
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not is_bool):
        return value  # an infinity or NaN too: that is for the rule of the field
    raise InputError(f"{where}: {key}: must be {_KINDS.get(hint, str(hint))}, got {show(value)}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _nearest(name: str, valid: Sequence[str] | Mapping[str, Any]) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid keys: {', '.join(valid)}"
