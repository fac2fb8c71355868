"""Tensors inside the nested tuples, lists and dictionaries that modules return."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Tensors of a nested value, in order; other objects are not entered."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for entry in dataclasses.fields(tree):
            yield from tensors_of(getattr(tree, entry.name))


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The nested value with every tensor replaced; one without tensors is returned itself."""
    if isinstance(tree, Tensor):
        return change(tree)
    if next(tensors_of(tree), None) is None:
        return tree
    if isinstance(tree, Mapping):
        result = copy.copy(tree)
        for key, value in tree.items():
            result[key] = map_tensors(value, change)  # type: ignore[index]
        return result
    if isinstance(tree, list | tuple):
        values = [map_tensors(value, change) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    changes = {
        entry.name: map_tensors(getattr(tree, entry.name), change)
        for entry in dataclasses.fields(tree)
    }
    result = copy.copy(tree)
    for name, value in changes.items():
        object.__setattr__(result, name, value)
    return result
