"""An attention's forward that calls our rotary positions, in a form that torch.compile knows."""

import functools
import sys
import types
from typing import Any

from torch import Tensor, nn

from merit_fast.kernels.layers import rope
from merit_fast.patch.classes import Forward, supported

ROPE = "apply_rotary_pos_emb"


def attention_forward(original: type[nn.Module], partial: bool, backend: str | None) -> Forward:
    """Makes an attention's forward: the same code, which calls our rope by another global name.

    The function keeps its module's own globals, since the compiler looks names up there.
    """
    plain: Any = original.forward
    name = f"_merit_fast_{'partial_' if partial else ''}rope_{backend or 'auto'}"
    module = sys.modules[plain.__globals__["__name__"]]
    if not hasattr(module, name):
        setattr(module, name, _following_rope(module, partial, backend))
    names = tuple(name if other == ROPE else other for other in plain.__code__.co_names)
    forward = types.FunctionType(
        plain.__code__.replace(co_names=names),
        plain.__globals__,
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )
    forward.__kwdefaults__ = plain.__kwdefaults__
    return functools.wraps(plain)(forward)


def _following_rope(module: types.ModuleType, partial: bool, backend: str | None) -> Forward:
    """Our rope in ``module``, until somebody replaces that module's own function."""
    replaced = getattr(module, ROPE)
    ours = rope_function(replaced, partial, backend)

    def rope_of_module(*args: Any, **kwargs: Any) -> Any:
        current = getattr(module, ROPE)
        return ours(*args, **kwargs) if current is replaced else current(*args, **kwargs)

    return rope_of_module


def rope_function(plain: Forward, partial: bool, backend: str | None) -> Forward:
    """Our rope where it computes what ``plain`` does, else ``plain``."""

    def positions(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        width = cos.shape[-1]
        head = q.shape[-1]
        fits = cos.dim() == 3 and (width == head or partial)
        if args or kwargs or not fits or not supported(q, k, cos, sin):
            return plain(q, k, cos, sin, *args, **kwargs)
        return rope(q, k, cos, sin, backend=backend)

    return positions
