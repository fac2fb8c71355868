"""Linear layers of frozen weights in fp32, by oneDNN where torch's own product is slow.

torch multiplies fp32 matrices by MKL, which has no fast path for AMD's processors. The choice
depends on the processor and the shapes only, so that equal machines give equal bits.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_LEAST_PRODUCTS = 1 << 22  # multiply-adds; below, the call itself costs more


def faster_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """``nn.Linear.forward`` with ``frozen_linear`` where it suits; any other forward as it is."""
    module = getattr(original, "__self__", None)
    if getattr(original, "__func__", None) is not nn.Linear.forward or module is None:
        return original

    def forward(input: Tensor) -> Tensor:
        weight: Tensor = module.weight
        if suits_onednn(input, weight):
            return frozen_linear(input, weight, module.bias)
        return original(input)  # type: ignore[no-any-return]

    return forward


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether ``frozen_linear`` computes this layer, and does so faster than ``F.linear``."""
    return (
        type(x) is Tensor
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not weight.requires_grad
        and x.dim() >= 2
        and x.numel() * len(weight) >= _LEAST_PRODUCTS
        and _mkl_is_slow()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with oneDNN's products, forward and backward; the gradient of x only.

        y = x @ weight.T + bias

    Args:
        x: [..., I] float32, contiguous or not.
        weight: [O, I] float32 without gradient.
        bias: [O], or None. Its gradient is torch's own.

    Returns:
        y: [..., O].
    """
    y: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None
        dx: Tensor = _Product.apply(dy, weight.T)  # type: ignore[no-untyped-call]
        return dx, None


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether torch multiplies by MKL on a processor of AMD, and has oneDNN too."""
    has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not (has_onednn and torch.backends.mkl.is_available()):  # type: ignore[no-untyped-call]
        return False
    file = Path("/proc/cpuinfo")
    return file.exists() and "AuthenticAMD" in file.read_text(errors="replace")
