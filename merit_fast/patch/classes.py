"""Swaps a module's class for a subclass with another forward; copies and pickles keep it."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]
# (original class, *options) -> the subclass's forward. A function of a module, since pickles name
# it.
Maker = Callable[..., Forward]
_SWAP = "_merit_fast_swap"


@dataclass(frozen=True)
class Swap:
    """A patched class's origin.

    Attributes:
        original: the class it replaces.
        maker: makes the forward that runs instead, of ``original`` and ``options``.
        options: hashable and picklable.
        proven: name of the forward that the proof compared: a process that opens a pickle may
            have another.
    """

    original: Any
    maker: Maker
    options: tuple[Any, ...]
    proven: str

    def is_in_force(self) -> bool:
        """Whether the class has the forward that was compared."""
        return name_of(self.original.forward) == self.proven


@dataclass(frozen=True)
class Plan:
    """A module that shall run the op by the forward ``maker(its class, *options)``."""

    module: nn.Module
    op: str
    maker: Maker
    options: tuple[Any, ...]


def swap_all(plans: Iterable[Plan]) -> None:
    """Gives every planned module its forward, or none of them if one cannot take it."""
    done: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for plan in plans:
            before = type(plan.module)
            origin = Swap(before, plan.maker, plan.options, name_of(before.forward))
            plan.module.__class__ = patched_class(origin)  # type: ignore[assignment]
            done.append((plan.module, before))
    except BaseException:
        set_classes(done)
        raise


def set_classes(classes: Iterable[tuple[nn.Module, type[nn.Module]]]) -> None:
    for module, cls in classes:
        module.__class__ = cls  # type: ignore[assignment]


def swap_back(module: nn.Module) -> None:
    """Gives a patched module its own class back; does nothing to any other module."""
    if swap_of(module) is not None:
        module.__class__ = _unpatched(type(module))  # type: ignore[assignment, arg-type]


def swap_of(module: nn.Module) -> Swap | None:
    """The swap that made this module's class, or a parent of it: ``fully_shard`` makes subclasses.

    None for a module that is not patched.
    """
    origin: Swap | None = getattr(type(module), _SWAP, None)
    return origin


@functools.cache
def _unpatched(cls: type) -> type:
    """``cls`` without the patched class among itself and its ancestors."""
    origin = vars(cls).get(_SWAP)
    if origin is not None:
        original: type = origin.original
        return original
    bases = tuple(_unpatched(base) if hasattr(base, _SWAP) else base for base in cls.__bases__)
    members = {
        name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")
    }
    return type(cls)(cls.__name__, bases, members)


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
            _SWAP: origin,
            "forward": _guarded_forward(origin),
        },
    )


def _guarded_forward(origin: Swap) -> Forward:
    """Runs our forward as long as the class has the one that was compared, else the class's."""
    original = origin.original
    plain = original.forward
    ours = origin.maker(original, *origin.options) if origin.is_in_force() else None

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if ours is not None and original.forward is plain:
            return ours(self, *args, **kwargs)
        return original.forward(self, *args, **kwargs)

    return forward


def own_class(cls: type) -> type:
    """The class that ``fully_shard`` has put its own before; any other class itself."""
    for ancestor in cls.__mro__:
        if not any(base.__name__ == "FSDPModule" for base in ancestor.__mro__):
            return ancestor
    return cls


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def name_of(function: Any) -> str:
    """Where a function is defined; a replaced one has another."""
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"


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
