"""RMS norms: a module with at most a weight and an epsilon."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.kernels.layers import rms_norm
from merit_fast.patch.classes import Forward, runs_ours, supported, swap_of
from merit_fast.patch.proof import (
    CASES,
    VIEWS,
    Match,
    agreement,
    foreign_part,
    random_tensor,
    twin_of,
)
from merit_fast.patch.reads import constants_read, has_constants

_VARIANTS = ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"), (1.0, "llama"))  # offset, casting
_OPERATIONS = VIEWS | {
    "pow", "mul", "mean", "add", "rsqrt", "sqrt", "div", "square", "reciprocal", "sum",
    "_fused_rms_norm", "rms_norm",
}  # fmt: skip
_LARGEST_EPSILON = 0.1
_DEFAULT_WIDTH = 16


def match_norm(module: nn.Module, device: torch.device, backend: str | None) -> Match | str:
    """Returns the reason if the module is no norm that our kernel computes."""
    epsilon = epsilon_of(module)
    if epsilon is None:
        return "has other parts than one weight and one epsilon"
    twins = [_twin(module, training, device, torch.float32) for training in (False, True)]
    x = random_tensor(3, _width(module), seed=2, device=device)
    foreign = foreign_part(module, twins, x, _OPERATIONS, [epsilon])
    if foreign is not None:
        return f"computes no RMSNorm that is known here ({foreign})"
    best = 0
    match = None
    for offset, casting in _VARIANTS:
        options = (epsilon, bool(module._parameters), offset, casting)
        constants = constants_read(module, [epsilon])
        ours = rms_norm_forward(type(module), *options, constants, backend)
        equal = _equal_bits(module, epsilon, ours, device)
        if equal > best:  # castings differ in single roundings of bfloat16
            best = equal
            match = Match("rms_norm", rms_norm_forward, (*options, constants))
    return match or "computes no RMSNorm that is known here"


def epsilon_of(module: nn.Module) -> str | None:
    """Name of the epsilon of a module that may be a norm; None for other modules."""
    parameters = module._parameters
    if module._modules or set(parameters) - {"weight"} or (not parameters and module._buffers):
        return None
    weight = parameters.get("weight")
    if parameters and (weight is None or weight.dim() != 1):
        return None
    names = [
        name
        for name, value in vars(module).items()
        if type(value) is float and 0 < value <= _LARGEST_EPSILON
    ]
    return names[0] if len(names) == 1 else None


def rms_norm_forward(
    original: type[nn.Module],
    epsilon: str,
    weighted: bool,
    offset: float,
    casting: str,
    constants: tuple[tuple[str, Any], ...],
    backend: str | None,
) -> Forward:
    """Makes a norm's forward: our kernel where it takes the tensors, else the module's own."""
    plain = original.forward

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        weight = self.weight if weighted else None
        tensors = (*args, weight) if weighted else args
        if (
            len(args) != 1
            or kwargs
            or not supported(*tensors)
            or not has_constants(self, constants)
        ):
            return plain(self, *args, **kwargs)
        return rms_norm(
            args[0],
            weight,
            getattr(self, epsilon),
            offset=offset,
            casting=casting,
            backend=backend,
        )

    return forward


def norm_in_use(module: nn.Module) -> tuple[Tensor | None, dict[str, Any]] | None:
    """(weight, other arguments) with which a patched norm calls the kernel; None if it does not."""
    origin = swap_of(module)
    if origin is None or origin.maker is not rms_norm_forward or not runs_ours(module):
        return None
    epsilon, weighted, offset, casting, constants, _ = origin.options
    if not has_constants(module, constants):
        return None
    options = {"epsilon": getattr(module, epsilon), "offset": offset, "casting": casting}
    return (module.weight if weighted else None), options  # type: ignore[return-value]


def _width(module: nn.Module) -> int:
    """The real width: some norms read it from an attribute. FSDP1 may hold 0 elements here."""
    weight = module._parameters.get("weight")
    return _DEFAULT_WIDTH if weight is None or not len(weight) else len(weight)


def _twin(module: nn.Module, training: bool, device: torch.device, dtype: torch.dtype) -> nn.Module:
    twin = twin_of(module, training)
    if module._parameters:
        weight = random_tensor(_width(module), seed=1, device=device, dtype=dtype)
        twin._parameters["weight"] = nn.Parameter(weight)
    return twin


def _equal_bits(module: nn.Module, epsilon: str, ours: Forward, device: torch.device) -> int:
    total = 0
    for number, case in enumerate(CASES):
        twin = _twin(module, case.training, device, case.dtype)
        if number % 2:
            setattr(twin, epsilon, 3 * getattr(module, epsilon))
        x = case.scale * random_tensor(
            *case.leading, _width(module), seed=3 + number, device=device, dtype=case.dtype
        )
        equal = agreement(
            functools.partial(type(module).forward, twin),
            functools.partial(ours, twin),
            [x],
            list(twin.parameters()),
        )
        if not equal:
            return 0
        total += equal
    return total
