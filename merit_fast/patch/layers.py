"""Finds the modules of a decoder that our layer kernels can replace, by a trial of each kind."""

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merit_fast.kernels.layers import geglu, rms_norm, swiglu
from merit_fast.patch.classes import Forward, Maker, supported, swap
from merit_fast.patch.rope import ROPE, attention_forward, rope_function

_APART = ["gate_proj", "up_proj", "down_proj"]
_JOINED = ["gate_up_proj", "down_proj"]
_PROJECTIONS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
_NORMS = ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"), (1.0, "llama"))  # offset, casting
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "swiglu": (F.silu, None),
    "geglu_tanh": (functools.partial(F.gelu, approximate="tanh"), "tanh"),
    "geglu": (F.gelu, "none"),
}


def patch_layers(decoder: nn.Module, backend: str | None) -> tuple[dict[str, int], list[str]]:
    """Swaps every norm, gated MLP and attention of ``decoder`` whose trial equals a kernel's.

    Returns:
        How many modules run each op, and a note for every kind of module that stays.
    """
    counts = dict.fromkeys(("rms_norm", "swiglu", "geglu", "rope"), 0)
    refused: dict[tuple[str, str], int] = {}
    finder = _Finder(next(decoder.parameters()).device, backend)
    for module in decoder.modules():
        name = type(module).__name__
        match_module = finder.matcher(name)
        if match_module is None:
            continue
        # accelerate's hooks and transformers' hub kernels sit on the instance: ours would not be
        # reached
        on_instance = "forward" in module.__dict__
        match = "has a forward of its own on the instance" if on_instance else match_module(module)
        if isinstance(match, Match):
            swap(module, match.maker, *match.options, backend)
            counts[match.op] += 1
        else:
            refused[name, match] = refused.get((name, match), 0) + 1
    notes = [f"{count} {name}: {reason}" for (name, reason), count in refused.items()]
    return {op: count for op, count in counts.items() if count}, notes


@dataclass(frozen=True)
class Match:
    """The op that computes what a module computes, and how its forward is made."""

    op: str
    maker: Maker
    options: tuple[Any, ...]


class _Finder:
    """Matches modules with ops; returns a reason for a module without one.

    Modules of equal code and settings are tried once.
    """

    def __init__(self, device: torch.device, backend: str | None) -> None:
        self.device = device
        self.backend = backend
        self._tried: dict[Any, Match | str] = {}
        self._by_ending = {"RMSNorm": self.norm, "MLP": self.mlp, "Attention": self.attention}

    def matcher(self, class_name: str) -> Callable[[nn.Module], Match | str] | None:
        """The method that tries modules of this class; None for a class of another kind."""
        for ending, method in self._by_ending.items():
            if class_name.endswith(ending):
                return method
        return None

    def norm(self, module: nn.Module) -> Match | str:
        names = ("variance_epsilon", "eps")
        epsilon = next(
            (name for name in names if isinstance(getattr(module, name, None), float)), ""
        )
        parameters = dict(module.named_parameters(recurse=False))
        if not epsilon or set(parameters) != {"weight"} or parameters["weight"].dim() != 1:
            return "has no weight with an epsilon"
        return self._once(
            (type(module), getattr(module, epsilon)), lambda: self._try_norms(module, epsilon)
        )

    def _try_norms(self, module: nn.Module, epsilon: str) -> Match | str:
        best = 0
        match = None
        for offset, casting in _NORMS:
            ours = rms_norm_forward(type(module), epsilon, offset, casting, self.backend)
            equal = 0
            for dtype in (torch.float32, torch.bfloat16):
                twin = _twin(module)
                twin._parameters["weight"] = nn.Parameter(
                    self._random(16, dtype=dtype, seed=1), False
                )
                x = self._random(3, 40, 16, dtype=dtype, seed=2)
                equal += _equal(type(module).forward, ours, twin, x)
            if equal > best:  # castings differ in single roundings of bfloat16
                best = equal
                match = Match("rms_norm", rms_norm_forward, (epsilon, offset, casting))
        return match or "computes no RMSNorm that is known here"

    def mlp(self, module: nn.Module) -> Match | str:
        children = dict(module.named_children())
        act = next(
            (name for name in ("act_fn", "activation_fn") if callable(getattr(module, name, None))),
            "",
        )
        projections = [name for name in _PROJECTIONS if name in children]
        if not act or projections not in (_APART, _JOINED):
            return "has other parts than gate, up and down projections with an activation"
        function = getattr(module, act)
        key = (type(module), type(function), getattr(function, "act", None) and str(function.act))
        return self._once(key, lambda: self._try_mlp(module, act, projections))

    def _try_mlp(self, module: nn.Module, act: str, projections: list[str]) -> Match | str:
        function = getattr(module, act)
        kinds = [
            kind
            for kind, (expected, _) in _ACTIVATIONS.items()
            if self._is_activation(function, expected)
        ]
        if not kinds:
            return f"activation {type(function).__name__} is neither SiLU nor GELU"
        twin = _twin(module)
        for seed, name in enumerate(projections):
            size = {"down_proj": (8, 6), "gate_up_proj": (12, 8)}.get(name, (6, 8))
            twin._modules[name] = self._linear(*size, seed)
        options = (act, kinds[0], projections == _JOINED)
        ours = mlp_forward(type(module), *options, self.backend)
        x = self._random(2, 5, 8, seed=5)
        if not _equal(type(module).forward, ours, twin, x):
            return "does more than down(act(gate(x)) * up(x))"
        return Match(kinds[0].split("_")[0], mlp_forward, options)

    def _is_activation(
        self, function: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor]
    ) -> bool:
        x = torch.linspace(-6, 6, 97, device=self.device)
        return torch.allclose(function(x), expected(x), rtol=0, atol=1e-6)

    def attention(self, module: nn.Module) -> Match | str:
        forward = type(module).forward
        scope = getattr(forward, "__globals__", {})
        home = sys.modules.get(scope.get("__name__", ""))
        called = getattr(getattr(forward, "__code__", None), "co_names", ())
        plain = getattr(home, ROPE, None)
        if plain is None or vars(home) is not scope or ROPE not in called:
            return f"does not call {ROPE} of its module"
        return self._once((type(module), plain), lambda: self._try_rope(plain))

    def _try_rope(self, plain: Forward) -> Match | str:
        q = self._random(2, 4, 5, 8, seed=1)
        k = self._random(2, 2, 5, 8, seed=2)
        works = []
        for width in (8, 4):
            ours = rope_function(plain, width < 8, self.backend)
            angles = self._random(2, 5, width // 2, seed=3).repeat(1, 1, 2)
            works.append(_equal(plain, ours, q, k, angles.cos(), angles.sin()))
        if not works[0]:
            return "rotates positions in another layout"
        return Match("rope", attention_forward, (bool(works[1]),))

    def _once(self, key: Any, attempt: Callable[[], Match | str]) -> Match | str:
        if key not in self._tried:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._tried[key] = attempt()
        return self._tried[key]

    def _linear(self, rows: int, columns: int, seed: int) -> nn.Linear:
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(self._random(rows, columns, seed=seed), False)
        return linear

    def _random(self, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return values.to(self.device, dtype)


def rms_norm_forward(
    original: type[nn.Module], epsilon: str, offset: float, casting: str, backend: str | None
) -> Forward:
    """Makes a norm's forward: our kernel where it takes the tensors, else the module's own."""
    plain = original.forward

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not supported(args[0], self.weight):
            return plain(self, *args, **kwargs)
        return rms_norm(
            args[0],
            self.weight,
            getattr(self, epsilon),
            offset=offset,
            casting=casting,
            backend=backend,
        )

    return forward


def mlp_forward(
    original: type[nn.Module], act: str, kind: str, joined: bool, backend: str | None
) -> Forward:
    """Makes a gated MLP's forward; ``joined``: gate and up are one projection."""
    approximate = _ACTIVATIONS[kind][1]  # None: SiLU

    @functools.wraps(original.forward)
    def forward(self: Any, x: Tensor) -> Any:
        gate, up = (
            self.gate_up_proj(x).chunk(2, dim=-1)
            if joined
            else (self.gate_proj(x), self.up_proj(x))
        )
        if not supported(gate, up):
            return self.down_proj(getattr(self, act)(gate) * up)
        if approximate is None:
            return self.down_proj(swiglu(gate, up, backend=backend))
        return self.down_proj(geglu(gate, up, approximate=approximate, backend=backend))

    return forward


def _twin(module: nn.Module) -> nn.Module:
    """Copies a module so that setting parameters or children leaves the original as it is."""
    twin = copy.copy(module)
    for registry in ("_parameters", "_modules", "_buffers", "_forward_hooks", "_forward_pre_hooks"):
        twin.__dict__[registry] = dict(module.__dict__[registry])
    return twin


def _equal(plain: Forward, ours: Forward, *arguments: Any) -> int:
    """Number of elements of the results with the same bits; 0 unless all agree within rounding."""
    try:
        expected = plain(*arguments)
    except Exception:  # whatever foreign code raises on the trial: it is not what we compute
        return 0
    actual = ours(*arguments)
    if isinstance(expected, Tensor):
        expected = (expected,)
        actual = (actual,)
    equal = 0
    for theirs, mine in zip(expected, actual, strict=True):
        tolerance = 1e-5 if theirs.dtype == torch.float32 else 2**-5
        if mine.dtype != theirs.dtype or not torch.allclose(
            mine, theirs, rtol=tolerance, atol=tolerance
        ):
            return 0
        equal += int((mine == theirs).sum())
    return equal
