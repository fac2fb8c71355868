"""Names that a forward uses, and the plain values of a module behind them."""

import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

_CONFIG = "config."


def name_of(function: Any) -> str:
    """The place of a function's definition; a replaced one has another.

    A wrapper takes the name of what it wraps, but its code keeps its own.
    """
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    code = getattr(getattr(function, "__code__", None), "co_qualname", "")
    return name if name.endswith(code) else f"{name} in {code}"


def names_used(cls: type, method: str) -> set[str]:
    """Names that a method uses, of any ancestor too, and those of the methods that it calls."""
    found: set[str] = set()
    waiting = [method]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for ancestor in cls.__mro__:
            if ancestor not in (nn.Module, object):
                new = set(_names_in(vars(ancestor).get(name)))
                found |= new
                waiting += new
    return found


def _names_in(function: Any) -> Iterator[str]:
    """Names in a function's code, in functions inside it, and in what it decorates."""
    function = getattr(function, "__func__", function)  # of a static or class method
    codes = [
        code
        for code in (
            getattr(function, "__code__", None),
            getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None),
        )
        if code is not None
    ]
    while codes:
        code = codes.pop()
        yield from code.co_names
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]


def constants_read(module: nn.Module, followed: Sequence[str] = ()) -> tuple[tuple[str, Any], ...]:
    """The plain values that a module's forward names, in so far as ours ignores them.

    They are the module's own and, if it names its config, the config's.
    """
    names = names_used(type(module), "forward") - {"training", *followed}
    values = {name: getattr(module, name) for name in names if hasattr(module, name)}
    config = values.get("config")
    if is_config(config):
        values |= {_CONFIG + name: getattr(config, name) for name in names if hasattr(config, name)}
    return tuple(sorted((name, value) for name, value in values.items() if is_constant(value)))


def value_of(module: nn.Module, name: str) -> Any:
    """The value under a name of ``constants_read``; None if there is none."""
    if name.startswith(_CONFIG):
        return getattr(getattr(module, "config", None), name.removeprefix(_CONFIG), None)
    return getattr(module, name, None)


def is_config(value: Any) -> bool:
    """Whether a value is a config of transformers."""
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def is_constant(value: Any) -> bool:
    """Whether a value is plain and cannot change in place, so that a later call can compare it."""
    if isinstance(value, tuple):
        return all(map(is_constant, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def has_constants(module: nn.Module, constants: tuple[tuple[str, Any], ...]) -> bool:
    """Whether a module still has the values of ``constants_read``."""
    for name, value in constants:  # a loop that torch.compile unrolls
        current = value_of(module, name)
        if type(current) is not type(value) or current != value:
            return False
    return True


def scalars_of(module: Any) -> tuple[tuple[str, Any], ...]:
    """The plain values among an activation's attributes."""
    members: Mapping[str, Any] = vars(module) if isinstance(module, nn.Module) else {}
    return tuple(
        sorted(
            (name, value)
            for name, value in members.items()
            if name != "training" and not name.startswith("_") and is_constant(value)
        )
    )
