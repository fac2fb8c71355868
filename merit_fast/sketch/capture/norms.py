"""Norms of any model, recognised by trying: y = a(w) n(x) + b."""

import torch
from torch import Tensor, nn

from merit_fast.sketch.divided.places import device_of


def unit_of_affine(module: nn.Module) -> nn.Module | None:
    """The module with such w, 0 or 1, and b = 0 that it returns n(x), if it is y = a(w) n(x) + b.

    Found by trying; None for any other module.
    """
    parameters = own_parameters(module)
    if set(parameters) not in ({"weight"}, {"weight", "bias"}):
        return None
    if any(parameter.dim() != 1 for parameter in parameters.values()):
        return None
    weight = parameters["weight"]
    if len(weight) == 1:  # it may multiply any number of channels
        return None
    device = device_of(module, weight)
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(shape, generator=generator, dtype=torch.float32).to(device)
        for shape in ((3, 2, len(weight)), weight.shape)
    )
    zero = torch.zeros_like(w)
    others = {local: zero for local in parameters if local != "weight"}
    try:
        low, high, at = (
            twin_of(module, {"weight": v, **others}).forward(x) for v in (zero, zero + 1, w)
        )
        shifted = twin_of(module, {"weight": w, **{local: w for local in others}}).forward(x)
        for value, result in ((1.0, high), (0.0, low)):
            bias = w if others else 0.0
            if torch.allclose(at - low, w * result, atol=1e-4) and torch.allclose(
                shifted, at + bias, atol=1e-4
            ):
                constants = {**dict.fromkeys(others, 0.0), "weight": value}
                values = {k: _filled(v, parameters[k], device) for k, v in constants.items()}
                return twin_of(module, values)
    except Exception:  # a foreign module raises anything; it is no norm over its last dimension
        return None
    return None


def epsilon_of_rms_norm(unit: nn.Module) -> float | None:
    """Epsilon for which unit(x) is x * rsqrt(mean(x ** 2, -1) + epsilon).

    Found by trying; None for any other module.
    """
    epsilon = getattr(unit, "variance_epsilon", getattr(unit, "eps", None))
    if not isinstance(epsilon, float):
        return None
    weight = unit.get_parameter("weight")
    x = torch.randn(4, 3, len(weight), generator=torch.Generator().manual_seed(1)).to(weight.device)
    lengths = torch.tensor([1e3, 1.0, 1e-2, epsilon**0.5], device=x.device)
    x *= lengths.view(4, 1, 1)  # the last tells epsilons apart
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    values = {local: parameter.float() for local, parameter in own_parameters(unit).items()}
    result = twin_of(unit, values).forward(x)
    return epsilon if torch.allclose(result, expected, rtol=1e-4, atol=1e-6) else None


def twin_of(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Returns a copy of the module with other values for its own parameters."""
    twin: nn.Module = object.__new__(type(module))  # FSDP's classes construct something else
    twin.__dict__.update(module.__dict__)
    twin._parameters = {
        **module._parameters,
        **{k: nn.Parameter(v, False) for k, v in values.items()},
    }
    for key in ("forward", "_old_forward", "_hf_hook"):
        twin.__dict__.pop(key, None)
    return twin


def _filled(value: float, like: Tensor, device: torch.device) -> Tensor:
    """A whole tensor of one value in the shape and dtype of a parameter."""
    return torch.full(like.shape, value, dtype=like.dtype, device=device)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))
