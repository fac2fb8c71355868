"""The layers' custom ops: ops and gradients make their results, the chosen backend fills them."""

from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.layers import _native
from merit_fast.kernels.layers._autograd import differentiable
from merit_fast.kernels.layers._layout import empty_heads, empty_rows, heads_inside


class NoKernels:
    """Fills nothing, for fakes: an op's results only have shapes, dtypes and strides."""

    norm = norm_backward = staticmethod(lambda *arguments: None)
    gated = gated_backward = rope = norm


def _kernels(backend: str) -> Any:
    """The backend's module; all have the same functions."""
    if backend == "none":
        return NoKernels
    if backend == "triton":
        from merit_fast.kernels.layers import _triton

        return _triton
    return _native


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
    """Gradients of x, with ``dtotal`` added, and of the weight, which is empty if not wanted."""
    dx = empty_rows(x, x.dtype)
    columns = x.shape[-1] if wants_weight else 0
    dscale = torch.empty(columns, dtype=torch.float32, device=x.device)
    scale = _scale(x, weight, offset)
    _kernels(backend).norm_backward(
        dout, dtotal, x, dx, scale, epsilon, dscale if wants_weight else None
    )
    return dx, dscale if weight is None else dscale.to(weight.dtype)


def _gradients_of_norm(
    ctx: Any, backward: Any, dout: Tensor, dtotal: Tensor | None, weight_index: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the weight, which is input number ``weight_index``."""
    x, weight = ctx.saved_tensors
    wants = weight is not None and ctx.needs_input_grad[weight_index]
    dx, dweight = backward(dout, dtotal, x, weight, ctx.epsilon, ctx.offset, wants, ctx.backend)
    return dx, dweight if wants else None


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.epsilon, ctx.offset, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _norm_gradients(ctx: Any, backward: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    return (*_gradients_of_norm(ctx, backward, dout, None, 1), None, None, None, None)


@differentiable(rms_norm_backward, _save_norm, _norm_gradients)
def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, offset: float, casting: str, backend: str
) -> Tensor:
    out = empty_rows(x, _scaled_dtype(x.dtype, weight, casting))
    scale = _scale(x, weight, offset)
    rounds = casting == "llama"
    _kernels(backend).norm(x, None, None, out, scale, epsilon, rounds)
    return out


def _save_added_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, residual, weight, ctx.epsilon, ctx.offset, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight)


def _added_norm_gradients(
    ctx: Any, backward: Any, dout: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor | None, ...]:
    dsum = dtotal
    dweight = None
    if dout is not None:
        dsum, dweight = _gradients_of_norm(ctx, backward, dout, dtotal, 2)
    dx, dresidual = (None if dsum is None else dsum.to(dtype) for dtype in ctx.dtypes)
    return dx, dresidual, dweight, None, None, None, None


@differentiable(rms_norm_backward, _save_added_norm, _added_norm_gradients)
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
    out = torch.empty_like(total, dtype=_scaled_dtype(total.dtype, weight, casting))
    scale = _scale(x, weight, offset)
    rounds = casting == "llama"
    _kernels(backend).norm(x, residual, total, out, scale, epsilon, rounds)
    return out, total


def _scaled_dtype(dtype: torch.dtype, weight: Tensor | None, casting: str) -> torch.dtype:
    """The dtype of the norm's result, as eager promotes it."""
    if weight is None or casting == "gemma":
        return dtype
    return torch.promote_types(dtype, weight.dtype)


def _scale(x: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    """The factors of a normed row, [H] float32."""
    if weight is None:
        return torch.ones(x.shape[-1], dtype=torch.float32, device=x.device)
    wide = weight.detach().float().contiguous()
    return offset + wide if offset else wide


def gated_backward(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    dgate = empty_rows(gate, gate.dtype)
    dup = torch.empty_like(dgate)
    _kernels(backend).gated_backward(dout, gate, up, dgate, dup, activation)
    return dgate, dup


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gated_gradients(ctx: Any, backward: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (*backward(dout, *ctx.saved_tensors, ctx.activation, ctx.backend), None, None)


@differentiable(gated_backward, _save_gated, _gated_gradients)
def gated(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    out = empty_rows(gate, gate.dtype)
    _kernels(backend).gated(gate, up, out, activation)
    return out


def gated_packed_backward(dout: Tensor, packed: Tensor, activation: str, backend: str) -> Tensor:
    dpacked = empty_rows(packed, packed.dtype)
    _kernels(backend).gated_backward(dout, *packed.chunk(2, -1), *dpacked.chunk(2, -1), activation)
    return dpacked


def _packed_gradients(ctx: Any, backward: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return backward(dout, *ctx.saved_tensors, ctx.activation, ctx.backend), None, None


@differentiable(gated_packed_backward, _save_gated, _packed_gradients)
def gated_packed(packed: Tensor, activation: str, backend: str) -> Tensor:
    gate, up = packed.chunk(2, -1)
    out = empty_rows(gate, gate.dtype)
    _kernels(backend).gated(gate, up, out, activation)
    return out


def rope_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    dtype: torch.dtype,
    q_inside: bool,
    k_inside: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """dq and dk lie as q and k do (``heads_inside``), so that their views need no copy."""
    dq = empty_heads(dq_out, dtype, q_inside)
    dk = empty_heads(dk_out, dtype, k_inside)
    _kernels(backend).rope(dq_out, dk_out, cos, sin, dq, dk, interleaved, True)
    return dq, dk


def _save_rope(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, cos, sin, ctx.interleaved, ctx.backend = inputs
    ctx.dtype = q.dtype
    ctx.inside = (heads_inside(q), heads_inside(k))
    ctx.save_for_backward(cos, sin)


def _rope_gradients(ctx: Any, backward: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    options = (ctx.interleaved, ctx.dtype, *ctx.inside, ctx.backend)
    gradients = backward(dq, dk, *ctx.saved_tensors, *options)
    return (*gradients, None, None, None, None)


@differentiable(rope_backward, _save_rope, _rope_gradients)
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, cos.dtype)
    q_out, k_out = (empty_heads(x, dtype, heads_inside(x)) for x in (q, k))
    _kernels(backend).rope(q, k, cos, sin, q_out, k_out, interleaved, False)
    return q_out, k_out
