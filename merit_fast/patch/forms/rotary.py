"""Rotary positions: an attention's own forward, whose rotating function has another name.

The code stays, and so do its globals. Only the name that it looks up is another, and the module
that holds the function holds ours under that name, where torch.compile finds it. Ours calls
whatever stands under the old name if that was replaced.
"""

import dis
import functools
import re
import sys
import types
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.kernels.layers import rope
from merit_fast.patch.classes import Forward, supported
from merit_fast.patch.proof import VIEWS, Match, agreement, foreign_operation, random_tensor
from merit_fast.patch.reads import name_of

_OPERATIONS = VIEWS | {
    "mul", "neg", "cat", "add", "sub", "stack",
}  # fmt: skip
_HEAD = 8


@dataclass(frozen=True)
class Layout:
    """The way in which a function rotates heads.

    Attributes:
        interleaved: an entry's partner is its neighbour, not the one half a head away.
        repeats: it takes the first half of the angles, once for each neighbour (GLM).
        partial: it copies the rest of heads that are wider than the angles.
    """

    interleaved: bool
    repeats: bool
    partial: bool

    @property
    def name(self) -> str:
        """A part of a Python name."""
        return f"{self.interleaved:d}{self.repeats:d}{self.partial:d}"


def match_rotary(module: nn.Module, device: torch.device, backend: str | None) -> Match | str:
    """Returns the reason if the module's forward calls no rotation that our kernel computes."""
    names = rotations_called(type(module).forward)
    if not names:
        return "calls no function that rotates positions"
    scope = _module_of(type(module).forward)
    if scope is None:
        return "belongs to no module that can be imported"
    proven = []
    for name in names:
        function = getattr(scope, name)
        layout = _layout_of(function, device, backend)
        if layout is not None:
            proven.append((name, name_of(function), layout))
    if not proven:
        return "rotates positions in another layout"
    return Match("rope", rotary_forward, (tuple(proven),))


def rotations_called(forward: Any) -> tuple[str, ...]:
    """Names of global functions of rotary positions that a forward calls."""
    code = getattr(forward, "__code__", None)
    if not isinstance(forward, types.FunctionType) or code is None:
        return ()
    as_attribute = {
        step.argval
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR")
    }
    return tuple(
        name
        for name in code.co_names
        if "rot" in name
        and name not in as_attribute
        and callable(forward.__globals__.get(name))
        and not isinstance(forward.__globals__[name], type)
    )


def rotary_forward(
    original: type[nn.Module], proven: tuple[tuple[str, str, Layout], ...], backend: str | None
) -> Forward:
    """Makes an attention's forward: the same code, which looks our functions up."""
    plain: Any = original.forward
    scope = _module_of(plain)
    if scope is None:
        raise RuntimeError(f"{original.__name__}: its forward belongs to no imported module")
    names = {}
    for name, function_name, layout in proven:
        if name_of(getattr(scope, name, None)) != function_name:
            continue  # this process has another function
        # Another function under this name, at another time, has a rotation of its own.
        ours = f"_merit_fast_{re.sub(r'[^0-9A-Za-z_]', '_', function_name)}_{layout.name}_{backend}"
        if not hasattr(scope, ours):
            setattr(scope, ours, _rotation(scope, name, layout, backend))
        names[name] = ours
    code = plain.__code__
    forward = types.FunctionType(
        code.replace(co_names=tuple(names.get(name, name) for name in code.co_names)),
        plain.__globals__,
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )
    forward.__kwdefaults__ = plain.__kwdefaults__
    return functools.wraps(plain)(forward)


def _rotation(scope: Any, name: str, layout: Layout, backend: str | None) -> Forward:
    """Makes a rotation with our kernel, as long as ``scope`` has the function that was compared."""
    proven = getattr(scope, name)

    @functools.wraps(proven)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = getattr(scope, name)
        if plain is not proven or args or kwargs or not _fits(q, k, cos, sin, layout):
            return plain(q, k, cos, sin, *args, **kwargs)
        return _rotated(q, k, cos, sin, layout, backend)

    return rotate


def _rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: Layout, backend: str | None
) -> tuple[Tensor, Tensor]:
    if layout.repeats:
        cos, sin = (x[..., : x.shape[-1] // 2].repeat_interleave(2, -1) for x in (cos, sin))
    return rope(q, k, cos, sin, interleaved=layout.interleaved, backend=backend)


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> bool:
    return (
        cos.dim() == 3
        and q.dim() == 4
        and (cos.shape[-1] == q.shape[-1] or layout.partial)
        and not cos.requires_grad
        and supported(q, k, cos, sin)
    )


def _module_of(forward: Any) -> Any:
    """The imported module whose globals a function uses; None if there is none."""
    variables = getattr(forward, "__globals__", None)
    scope = sys.modules.get((variables or {}).get("__name__", ""))
    return scope if scope is not None and vars(scope) is variables else None


def _layout_of(function: Any, device: torch.device, backend: str | None) -> Layout | None:
    """The layout in which our kernel rotates as ``function`` does; None if there is none."""
    for interleaved, repeats in ((False, False), (True, False), (True, True)):
        layout = Layout(interleaved, repeats, partial=True)
        if _agrees(function, layout, _HEAD, device, backend):
            partial = _agrees(function, layout, _HEAD // 2, device, backend)
            return replace(layout, partial=partial)
    return None


def _agrees(
    function: Any, layout: Layout, width: int, device: torch.device, backend: str | None
) -> bool:
    shapes = ((2, 5, 4, 2, 2, 1.0), (1, 1, 2, 1, 1, 30.0), (3, 4, 3, 3, 1, 1e-3))
    for number, (rows, tokens, heads, kv_heads, angle_rows, scale) in enumerate(shapes):
        for dtype in (torch.float32, torch.bfloat16):
            make = functools.partial(random_tensor, device=device, dtype=dtype)
            q = scale * make(rows, tokens, heads, _HEAD, seed=number).transpose(1, 2)
            k = scale * make(rows, tokens, kv_heads, _HEAD, seed=9 + number).transpose(1, 2)
            angles = make(angle_rows, tokens, width // 2, seed=20 + number)
            angles = _both(angles, layout)
            cos = angles.cos()
            sin = angles.sin()
            plain = functools.partial(function, cos=cos, sin=sin)
            if foreign_operation(plain, [q, k], _OPERATIONS) is not None:
                return False
            ours = functools.partial(_rotated, cos=cos, sin=sin, layout=layout, backend=backend)
            if not agreement(plain, ours, [q, k]):
                return False
    return True


def _both(angles: Tensor, layout: Layout) -> Tensor:
    """Angles for both entries of each pair, where the caller of a rotation puts them."""
    if layout.interleaved and not layout.repeats:
        return angles.repeat_interleave(2, -1)
    return angles.repeat(1, 1, 2)
