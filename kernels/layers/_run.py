"""Each op and its gradient on the backend named, for tensors that are there: results are made here, then filled."""

from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.layers import _native
from merit_fast.kernels.layers._layout import empty_heads, empty_rows, heads_inside


class NoKernels:
    """Fills nothing: what is left of an op is the shapes, dtypes and strides of its results."""

    norm = norm_backward = gated = gated_backward = rope = staticmethod(lambda *arguments: None)


def _kernels(backend: str) -> Any:
    """The modules of the two backends have the same functions."""
    if backend == "none":
        return NoKernels
    if backend == "triton":
        from merit_fast.kernels.layers import _triton

        return _triton
    return _native


def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, offset: float, casting: str, backend: str
) -> Tensor:
    out = empty_rows(x, scaled_dtype(x.dtype, weight, casting))
    scale, rounds = _scale(x, weight, offset), casting == "llama"
    _kernels(backend).norm(x, None, None, out, scale, epsilon, rounds)
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    offset: float,
    casting: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    total = empty_rows(residual, torch.promote_types(x.dtype, residual.dtype))
    out = torch.empty_like(total, dtype=scaled_dtype(total.dtype, weight, casting))
    scale, rounds = _scale(x, weight, offset), casting == "llama"
    _kernels(backend).norm(x, residual, total, out, scale, epsilon, rounds)
    return out, total


def rms_norm_backward(
    dout: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    epsilon: float,
    offset: float,
    wants_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, to which ``dtotal`` is added, and of the weight: empty if not wanted."""
    dx = empty_rows(x, x.dtype)
    columns = x.shape[-1] if wants_weight else 0
    dscale = torch.empty(columns, dtype=torch.float32, device=x.device)
    scale = _scale(x, weight, offset)
    _kernels(backend).norm_backward(
        dout, dtotal, x, dx, scale, epsilon, dscale if wants_weight else None
    )
    return dx, dscale if weight is None else dscale.to(weight.dtype)


def gated(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    out = empty_rows(gate, gate.dtype)
    _kernels(backend).gated(gate, up, out, activation)
    return out


def gated_backward(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    dgate = empty_rows(gate, gate.dtype)
    dup = torch.empty_like(dgate)
    _kernels(backend).gated_backward(dout, gate, up, dgate, dup, activation)
    return dgate, dup


def gated_packed(packed: Tensor, activation: str, backend: str) -> Tensor:
    gate, up = packed.chunk(2, -1)
    return gated(gate, up, activation, backend)


def gated_packed_backward(dout: Tensor, packed: Tensor, activation: str, backend: str) -> Tensor:
    dpacked = empty_rows(packed, packed.dtype)
    _kernels(backend).gated_backward(dout, *packed.chunk(2, -1), *dpacked.chunk(2, -1), activation)
    return dpacked


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, cos.dtype)
    q_out, k_out = (empty_heads(x, dtype, heads_inside(x)) for x in (q, k))
    _kernels(backend).rope(q, k, cos, sin, q_out, k_out, False)
    return q_out, k_out


def rope_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    dtype: torch.dtype,
    q_inside: bool,
    k_inside: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """dq and dk lie as q and k do (``heads_inside``), so that no view behind them has to copy."""
    dq, dk = empty_heads(dq_out, dtype, q_inside), empty_heads(dk_out, dtype, k_inside)
    _kernels(backend).rope(dq_out, dk_out, cos, sin, dq, dk, True)
    return dq, dk


def scaled_dtype(dtype: torch.dtype, weight: Tensor | None, casting: str) -> torch.dtype:
    """That of the norm's result, as eager promotes it."""
    return (
        dtype if weight is None or casting == "gemma" else torch.promote_types(dtype, weight.dtype)
    )


def _scale(x: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    """What a normed row is multiplied by, [H] float32."""
    if weight is None:
        return torch.ones(x.shape[-1], dtype=torch.float32, device=x.device)
    wide = weight.detach().float().contiguous()
    return offset + wide if offset else wide
