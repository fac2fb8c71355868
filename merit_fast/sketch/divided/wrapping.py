"""Replaces the forward of a module for a time."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_WRAPPED = "_merit_fast_wrapped"  # attribute of a forward that took the place of another


def wrap_forward(module: nn.Module, around: Callable[..., Any]) -> Callable[[], object]:
    """Replaces ``module.forward(...)`` by ``around(module.forward, ...)``; returns the undoing.

    Hooks of the user's own run outside of it, and so do accelerate's.
    """
    key = _key_of(module)
    original = getattr(module, key)
    before = module.__dict__.get(key)
    wrapper = functools.wraps(original)(functools.partial(around, original))
    setattr(wrapper, _WRAPPED, original)
    module.__dict__[key] = wrapper
    if before is None:
        return functools.partial(module.__dict__.pop, key)
    return functools.partial(module.__dict__.__setitem__, key, before)


def _key_of(module: nn.Module) -> str:
    """Attribute with the forward that runs inside of accelerate's hooks, which replace another."""
    is_hooked = "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__
    return "_old_forward" if is_hooked else "forward"


def own_forward(module: nn.Module) -> Any:
    """The function that ``module.forward`` calls, without ``wrap_forward``'s."""
    forward: Any = module.__dict__.get(_key_of(module), type(module).forward)
    while hasattr(forward, _WRAPPED):
        forward = getattr(forward, _WRAPPED)
    return getattr(forward, "__func__", forward)


def submodule(module: nn.Module, getter: str) -> nn.Module | None:
    """Calls get_input_embeddings(), get_output_embeddings() or get_decoder(); None without such."""
    try:
        found: nn.Module | None = getattr(module, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return found


def contiguous_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Makes the inputs contiguous.

    With a frozen weight and strided input (a head after a slice) torch copies the weight once per
    example.
    """
    return tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)
