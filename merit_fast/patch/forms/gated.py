"""Gated MLPs: down(act(gate(x)) * up(x)), with gate and up apart or as one projection."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merit_fast.kernels.layers import geglu, swiglu
from merit_fast.patch.classes import Forward, has_hooks, supported
from merit_fast.patch.proof import (
    CASES,
    RUNS,
    VIEWS,
    Match,
    agreement,
    foreign_part,
    random_tensor,
    twin_of,
)
from merit_fast.patch.reads import constants_read, has_constants, scalars_of, value_of

_OPERATIONS = VIEWS | {
    "mm", "addmm", "bmm", "mv", "addmv", "dot", "silu", "gelu", "mul", "sigmoid", "tanh", "pow",
    "erf", "add", "div",
}  # fmt: skip
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "swiglu": (F.silu, None),
    "geglu_tanh": (functools.partial(F.gelu, approximate="tanh"), "tanh"),
    "geglu": (F.gelu, "none"),
}
_OTHER_PARTS = "has other parts than gate, up and down projections with an activation"


@dataclass(frozen=True)
class Gated:
    """The form of one gated MLP.

    Attributes:
        parts: names of (gate, up, down), or of (gate and up in one, down).
        is_up_first: whether the joined projection gives ``up`` first.
        act: the activation's name; "" if the forward calls a function.
        act_kind: class of the activation, or the function itself.
        act_scalars: its plain values at the proof.
        op: swiglu, geglu_tanh or geglu.
        constants: what else of the module the forward reads.
    """

    parts: tuple[str, ...]
    is_up_first: bool
    act: str
    act_kind: Any
    act_scalars: tuple[tuple[str, Any], ...]
    op: str
    constants: tuple[tuple[str, Any], ...]


def match_gated(module: nn.Module, device: torch.device, backend: str | None) -> Match | str:
    """Returns the reason if the module is no gated MLP that our kernels compute."""
    found = gated_parts(module)
    if found is None:
        return _OTHER_PARTS
    linears, act = found
    function = getattr(module, act) if act else None
    ops = [
        op
        for op, (expected, _) in _ACTIVATIONS.items()
        if function is None or _is_activation(function, expected, device)
    ]
    if not ops:
        return (
            f"activation {getattr(function, '__name__', type(function).__name__)} is neither "
            "SiLU nor GELU"
        )
    trial = _Trial(module, linears, device)
    reason = trial.foreign(act)
    if reason is not None:
        return reason
    kind = type(function) if isinstance(function, nn.Module) else function
    for op, (parts, is_up_first) in itertools.product(ops, _orders(linears)):
        constants = constants_read(module)
        form = Gated(parts, is_up_first, act, kind, scalars_of(function), op, constants)
        if trial.proves(form, backend):
            return Match(op.split("_")[0], gated_forward, (form,))
    return "does more than down(act(gate(x)) * up(x))"


def gated_parts(module: nn.Module) -> tuple[dict[str, tuple[int, int]], str] | None:
    """Projections with their (in, out) sizes, and the activation's name, "" if it has none."""
    linears = {}
    acts = []
    for name, child in module._modules.items():
        sizes = getattr(child, "in_features", None), getattr(child, "out_features", None)
        if type(sizes[0]) is int and type(sizes[1]) is int:
            linears[name] = (int(sizes[0]), int(sizes[1]))
        else:
            acts.append(name)
    acts += [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and not isinstance(value, type)
    ]
    if len(linears) not in (2, 3) or len(acts) > 1 or module._parameters:
        return None
    if not any(True for _ in _orders(linears)):
        return None
    return linears, acts[0] if acts else ""


def _orders(linears: dict[str, tuple[int, int]]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The roles that projections may have by their sizes."""
    for parts in itertools.permutations(linears):
        sizes = [linears[name] for name in parts]
        width, inner = sizes[-1][1], sizes[-1][0]
        if len(parts) == 3 and sizes[0] == sizes[1] == (width, inner):
            yield parts, False
        if len(parts) == 2 and sizes[0] == (width, 2 * inner):
            yield parts, False
            yield parts, True


def _is_activation(
    function: Callable[[Tensor], Tensor],
    expected: Callable[[Tensor], Tensor],
    device: torch.device,
) -> bool:
    x = torch.linspace(-6, 6, 97, device=device)
    try:
        return torch.allclose(function(x), expected(x), rtol=0, atol=1e-6)
    except Exception:  # a callable that takes something else
        return False


class _Trial:
    """Compares a module with our forms on narrow random projections."""

    def __init__(
        self, module: nn.Module, linears: dict[str, tuple[int, int]], device: torch.device
    ) -> None:
        self.module = module
        self.linears = linears
        self.device = device
        parts = next(_orders(linears))[0]
        inner, width = linears[parts[-1]]
        small = 8 if inner == width else 4 if width == 2 * inner else 6
        self.width = 8
        self.sizes = {2 * inner: 2 * small, inner: small, width: self.width}
        self.called: list[tuple[bool, str]] = []

    def twin(self, training: bool, dtype: torch.dtype) -> nn.Module:
        twin = twin_of(self.module, training)
        for name, value in vars(twin).items():
            if type(value) is int and value in self.sizes:
                setattr(twin, name, self.sizes[value])
        for seed, (name, sizes) in enumerate(self.linears.items()):
            columns, rows = (self.sizes[size] for size in sizes)
            child = self.module._modules[name]
            has_bias = isinstance(getattr(child, "bias", None), Tensor)
            linear = nn.Linear(columns, rows, has_bias, device="meta")
            for number, parameter in enumerate(linear._parameters):
                if linear._parameters[parameter] is not None:
                    shape = (rows, columns) if parameter == "weight" else (rows,)
                    values = random_tensor(
                        *shape, seed=10 * seed + number, device=self.device, dtype=dtype
                    )
                    linear._parameters[parameter] = nn.Parameter(values)
            linear.register_forward_hook(functools.partial(self._record, (training, name)))
            twin._modules[name] = linear
        return twin

    def _record(self, call: tuple[bool, str], *_: Any) -> None:
        self.called.append(call)

    def foreign(self, act: str) -> str | None:
        """The reason why the module's own forward is no form of ours, if it shows in its calls."""
        twins = [self.twin(training, torch.float32) for training in (False, True)]
        x = random_tensor(3, self.width, seed=50, device=self.device)
        self.called.clear()
        name = foreign_part(self.module, twins, x, _OPERATIONS, [act])
        if name is not None:
            return f"does more than down(act(gate(x)) * up(x)) ({name})"
        calls = itertools.product((False, True), self.linears)
        if any(self.called.count(call) != RUNS for call in calls):
            return "does not call each of its projections once"
        return None

    def proves(self, form: Gated, backend: str | None) -> bool:
        for number, case in enumerate(CASES):
            twin = self.twin(case.training, case.dtype)
            # The constants are those of the real sizes.
            narrow = {name: value_of(twin, name) for name, _ in form.constants}
            fitting = Gated(**{**vars(form), "constants": tuple(narrow.items())})
            ours = gated_forward(type(self.module), fitting, backend)
            x = case.scale * random_tensor(
                *case.leading, self.width, seed=60 + number, device=self.device, dtype=case.dtype
            )
            plain = functools.partial(type(self.module).forward, twin)
            if not agreement(plain, functools.partial(ours, twin), [x], list(twin.parameters())):
                return False
        return True


def gated_forward(original: type[nn.Module], form: Gated, backend: str | None) -> Forward:
    """Makes a gated MLP's forward; what the proof assumed is checked at every call."""
    plain = original.forward
    approximate = _ACTIVATIONS[form.op][1]  # None: SiLU
    act_forward = getattr(form.act_kind, "forward", None)
    *_, down = form.parts

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) + len(kwargs) != 1 or not has_constants(self, form.constants):
            return plain(self, *args, **kwargs)
        if form.act and not _is_proven(getattr(self, form.act), form, act_forward):
            return plain(self, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        gate, up = _gate_and_up(self, form, x)
        if not supported(gate, *(() if up is None else (up,))):
            gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
            act = getattr(self, form.act) if form.act else _ACTIVATIONS[form.op][0]
            return getattr(self, down)(act(gate) * up)
        if approximate is None:
            return getattr(self, down)(swiglu(gate, up, backend=backend))
        return getattr(self, down)(geglu(gate, up, approximate=approximate, backend=backend))

    return forward


def _gate_and_up(module: Any, form: Gated, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(gate, up), or (both in one, None)."""
    first = getattr(module, form.parts[0])(x)
    if len(form.parts) == 3:
        return first, getattr(module, form.parts[1])(x)
    if form.is_up_first:
        up, gate = first.chunk(2, dim=-1)
        return gate, up
    return first, None


def _is_proven(act: Any, form: Gated, act_forward: Any) -> bool:
    """Whether an activation is still the one that was compared."""
    if not isinstance(act, nn.Module):
        return act is form.act_kind
    return (
        type(act) is form.act_kind
        and type(act).forward is act_forward
        and "forward" not in act.__dict__
        and not has_hooks(act)
        and has_constants(act, form.act_scalars)
    )
