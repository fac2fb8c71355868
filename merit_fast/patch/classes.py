"""Swaps a module's class for a subclass with another forward; copies and pickles keep it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]
# (original class, *options) -> the subclass's forward. A function of a module, since pickles name
# it.
Maker = Callable[..., Forward]


@dataclass(frozen=True)
class Swap:
    """A patched class's origin: the class it replaces and the call that made its forward."""

    original: Any
    maker: Maker
    options: tuple[Any, ...]


def swap(module: nn.Module, maker: Maker, *options: Any) -> None:
    """Gives this module the forward ``maker(its class, *options)``; all else of it stays."""
    module.__class__ = patched_class(Swap(type(module), maker, options))  # type: ignore[assignment]


def swap_back(module: nn.Module) -> None:
    """Gives a patched module its own class back; does nothing to any other module."""
    origin = swap_of(module)
    if origin is not None:
        module.__class__ = origin.original


def swap_of(module: nn.Module) -> Swap | None:
    """The swap that made this module's class; None for a module that is not patched."""
    origin: Swap | None = type(module).__dict__.get("_merit_fast_swap")
    return origin


@functools.cache
def patched_class(origin: Swap) -> type[nn.Module]:
    """Makes a subclass with its parent's name: transformers looks names up."""
    original = origin.original

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        state = object.__reduce_ex__(self, protocol)[2]  # type: ignore[misc]
        return _new_instance, (origin,), state

    return type(
        original.__name__,
        (original,),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": __reduce_ex__,
            "_merit_fast_swap": origin,
            "forward": origin.maker(original, *origin.options),
        },
    )


def _new_instance(origin: Swap) -> nn.Module:
    """Makes an empty patched module while a pickle loads."""
    cls = patched_class(origin)
    return cls.__new__(cls)


def supported(*tensors: Any) -> bool:
    """Whether our kernels take these together: plain tensors, all float32 or all bfloat16."""
    first = tensors[0].dtype
    return first in (torch.float32, torch.bfloat16) and all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == first for tensor in tensors
    )
