"""How one module gets another forward: its class is swapped for a subclass of it, which copies and pickles with it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]
# kind -> (original class, *options) -> the forward of the subclass
MAKERS: dict[str, Callable[..., Forward]] = {}


def swap(module: nn.Module, kind: str, *options: Any) -> None:
    """Gives this one module the forward that ``MAKERS[kind]`` makes. Parameters, hooks and names stay as they are."""
    module.__class__ = patched_class(type(module), kind, options)  # type: ignore[arg-type]


def swap_back(module: nn.Module) -> None:
    if is_patched(module):
        module.__class__ = type(module)._merit_fast_patch[0]  # type: ignore[attr-defined]


def is_patched(module: nn.Module) -> bool:
    return "_merit_fast_patch" in type(module).__dict__


@functools.cache
def patched_class(original: Any, kind: str, options: tuple[Any, ...]) -> type[nn.Module]:
    """A subclass under its parent's name: transformers goes by names in configs, device maps and recorded outputs."""
    make = MAKERS[kind]

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        state = object.__reduce_ex__(self, protocol)[2]  # type: ignore[misc]
        return _new_instance, (original, kind, options), state

    return type(
        original.__name__,
        (original,),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": __reduce_ex__,
            "_merit_fast_patch": (original, kind, options),
            "forward": make(original, *options),
        },
    )


def _new_instance(original: type[nn.Module], kind: str, options: tuple[Any, ...]) -> nn.Module:
    cls = patched_class(original, kind, options)  # type: ignore[arg-type]
    return cls.__new__(cls)


def supported(*tensors: Any) -> bool:
    """Whether our kernels take these together: plain tensors of one dtype, float32 or bfloat16."""
    first = tensors[0].dtype
    return first in (torch.float32, torch.bfloat16) and all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == first for tensor in tensors
    )
