"""The references: plain PyTorch, as transformers writes it. float64 inputs compute in float64."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, offset: float, casting: str
) -> Tensor:
    wide = _at_least_float32(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    if weight is None:
        return y.to(x.dtype)
    if casting == "llama":
        return y.to(x.dtype) * (offset + weight if offset else weight)
    return (y * (offset + _at_least_float32(weight))).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float, offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    total = residual + x
    return rms_norm(total, weight, epsilon, offset, casting), total


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return GATES[activation](gate) * up


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    rotary = cos.shape[-1]

    def rotated(x: Tensor) -> Tensor:
        x, rest = x[..., :rotary], x[..., rotary:]
        if interleaved:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        else:
            turned = torch.cat([-x[..., rotary // 2 :], x[..., : rotary // 2]], -1)
        out = x * cos + turned * sin
        return torch.cat([out, rest], -1) if rest.shape[-1] else out

    return rotated(q), rotated(k)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
