"""Rows looked up once for all examples, such as those of positions: copied where they are added.

The gradient of such rows would arrive summed over the examples. The lookup keeps its shape; where
it is added to values [B, T, C], each example gets rows of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ADDITIONS = {
    torch.add,
    Tensor.add,
    Tensor.add_,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.__iadd__,
}
_CASTS = {Tensor.to, Tensor.type_as, Tensor.float, Tensor.bfloat16, Tensor.half, Tensor.contiguous}


class SharedRows(Tensor):
    """Values [1, T, C] or [T, C] that know their copies [B, T, C].

    Attributes:
        plain: the values as an ordinary tensor.
        copies: computes the copies, whose gradient is taken per example.
        examples: B.
        refuse: called before any other use, which the copies could change.
    """

    plain: Tensor
    copies: Callable[[], Tensor]
    examples: int
    refuse: Callable[[], None]

    @classmethod
    def of(
        cls,
        plain: Tensor,
        copies: Callable[[], Tensor],
        size: int,
        refuse: Callable[[], None],
    ) -> "SharedRows":
        rows = plain.detach().as_subclass(cls)
        rows.plain = plain
        rows.copies = copies
        rows.examples = size
        rows.refuse = refuse
        return rows

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rows = next(value for value in (*args, *kwargs.values()) if isinstance(value, cls))
        if func in _ADDITIONS and not kwargs and len(args) == 2:
            others = [value for value in args if not isinstance(value, cls)]
            if len(others) == 1 and _is_batched(others[0], rows):
                return func(*(rows.copies() if value is rows else value for value in args))
        if func is Tensor.expand_as and args[0] is rows and _is_batched(args[1], rows):
            return rows.copies()
        if func in _CASTS and args[0] is rows:
            result = func(rows.plain, *_plain(args[1:]), **kwargs)
            copies = rows.copies
            return cls.of(
                result,
                lambda: func(copies(), *_plain(args[1:]), **kwargs),
                rows.examples,
                rows.refuse,
            )
        result = func(*_plain(args), **{key: _plain([v])[0] for key, v in kwargs.items()})
        if isinstance(result, Tensor | list | tuple) and not isinstance(result, torch.Size):
            rows.refuse()
        return result


def _is_batched(value: Any, rows: SharedRows) -> bool:
    return isinstance(value, Tensor) and value.shape == (rows.examples, *rows.plain.shape[-2:])


def _plain(values: Any) -> list[Any]:
    return [
        value.plain
        if isinstance(value, SharedRows)
        else type(value)(_plain(value))
        if type(value) in (list, tuple)
        else value
        for value in values
    ]
