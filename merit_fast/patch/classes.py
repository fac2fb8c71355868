"""Swaps a module's class for a subclass with another forward; copies and pickles keep it."""

import functools
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.patch.reads import name_of, names_used

Forward = Callable[..., Any]
# (original class, *options) -> the subclass's forward. A function of a module, since pickles name
# it.
Maker = Callable[..., Forward]
_SWAP = "_merit_fast_swap"
_OURS = "_merit_fast_forward"
_PROVEN = "_merit_fast_proven"


@dataclass(frozen=True)
class Swap:
    """A patched class's origin.

    Attributes:
        original: the class it replaces.
        maker: makes the forward that runs instead, of ``original`` and ``options``.
        options: hashable and picklable.
        proven: names of the functions that the proof compared: a process that opens a pickle may
            have others.
    """

    original: Any
    maker: Maker
    options: tuple[Any, ...]
    proven: tuple[str, ...]


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
            origin = Swap(before, plan.maker, plan.options, _names_of_methods(before))
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
    is_proven = _names_of_methods(original) == origin.proven
    methods = _methods_run(original) if is_proven else ()
    forward = _guarded_forward(origin, methods)

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
            _OURS: forward,
            _PROVEN: methods,
            "forward": forward,
        },
    )


def _guarded_forward(origin: Swap, methods: tuple[tuple[str, Any], ...]) -> Forward:
    """Runs our forward as long as the module has the methods that were compared, else its own.

    None are given if the class has other methods than those.
    """
    original = origin.original
    ours = origin.maker(original, *origin.options) if methods else original.forward

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if methods and _has_methods(self, original, methods):
            return ours(self, *args, **kwargs)
        return original.forward(self, *args, **kwargs)

    return forward


def _has_methods(module: Any, original: type, methods: tuple[tuple[str, Any], ...]) -> bool:
    """Whether a module still runs the methods of ``original``, none of them on the instance."""
    for name, method in methods:
        if getattr(original, name, None) is not method:
            return False
        if name != "forward" and name in module.__dict__:
            return False
    return True


def runs_ours(module: nn.Module) -> bool:
    """Whether a call of this module, but for its hooks, is a call of the forward put into it."""
    origin = swap_of(module)
    if origin is None or "forward" in module.__dict__:  # sketches and accelerate wrap it there
        return False
    cls: Any = type(module)
    methods = getattr(cls, _PROVEN)
    is_ours = bool(methods) and cls.forward is getattr(cls, _OURS)
    return is_ours and _has_methods(module, origin.original, methods)


def method_on_instance(module: nn.Module) -> str | None:
    """A method that the forward of a module's class runs, replaced on the instance."""
    return next((name for name, _ in _methods_run(type(module)) if name in module.__dict__), None)


def _methods_run(cls: type[nn.Module]) -> tuple[tuple[str, Any], ...]:
    """The forward of a class and its other methods that the forward may call."""
    names = sorted(name for name in names_used(cls, "forward") if not hasattr(nn.Module, name))
    methods = [(name, getattr(cls, name, None)) for name in names]
    functions = [pair for pair in methods if isinstance(pair[1], types.FunctionType)]
    return (("forward", cls.forward), *functions)


def _names_of_methods(cls: type[nn.Module]) -> tuple[str, ...]:
    return tuple(name_of(method) for _, method in _methods_run(cls))


def own_class(cls: type) -> type:
    """The class that ``fully_shard`` has put its own before; any other class itself."""
    for ancestor in cls.__mro__:
        if not any(base.__name__ == "FSDPModule" for base in ancestor.__mro__):
            return ancestor
    return cls


def has_hooks(module: nn.Module) -> bool:
    """Whether something looks at calls of this module, or at those of every module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
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
