"""Layers between a transformer's matrix products: norms, gated activations, rotary positions.

Arithmetic is in float32 for every dtype, results are rounded once, and no bit depends on the number
of threads. The backward pass reads only tensors that the layer keeps anyway: it computes inverse
RMS and activations again. All ops differentiate once; a gradient of a gradient raises, except with
``backend="eager"``, which is plain PyTorch. float32 and bfloat16 have kernels; other dtypes run in
eager unless another backend is asked for. GPUs run our kernels, not liger-kernel's: one definition
of rounding and layout on every device.
"""

import torch
from torch import Tensor

from merit_fast.errors import BackendUnavailableError
from merit_fast.kernels import dispatch
from merit_fast.kernels.layers import _eager, _ops
from merit_fast.kernels.layers._checks import check_norm, check_rope

__all__ = ["add_rms_norm", "geglu", "rms_norm", "rope", "swiglu"]

_DTYPES = (torch.float32, torch.bfloat16)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    epsilon: float,
    *,
    offset: float = 0.0,
    casting: str = "llama",
    backend: str | None = None,
) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019) over the last dimension, as transformers computes it.

        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
        y.to(x.dtype) * (offset + weight)                   # casting="llama"
        (y * (offset + weight.float())).to(x.dtype)         # casting="gemma", whose offset is 1

    Args:
        x: [..., H]. Views whose rows have one stride are read where they lie, in any order of the
            other dimensions.
        weight: [H], of any of the dtypes; None: y.to(x.dtype).
        epsilon: added to the mean square.
        offset: added to the weight.
        casting: "llama" rounds to x's dtype before the weight, "gemma" after it.
        backend: "eager", "cpu", "triton"; None chooses by device.

    Returns:
        x's shape and layout; x's dtype, with casting="llama" promoted by the weight's dtype.

    Raises:
        ValueError: shapes disagree or casting is unknown.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    check_norm("rms_norm", x, weight, casting)
    chosen = _choose("rms_norm", backend, x, weight)
    if chosen == "eager":
        return _eager.rms_norm(x, weight, epsilon, offset, casting)
    result: Tensor = _ops.rms_norm(x, weight, epsilon, offset, casting, chosen)
    return result


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    *,
    offset: float = 0.0,
    casting: str = "llama",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of a residual sum, in one pass.

        total = residual + x
        return rms_norm(total, weight, epsilon, offset=offset, casting=casting), total

    Args:
        x: [..., H].
        residual: [..., H], added to ``x``.
        weight: as in ``rms_norm``.
        epsilon: as in ``rms_norm``.
        offset: as in ``rms_norm``.
        casting: as in ``rms_norm``.
        backend: as in ``rms_norm``.

    Returns:
        The norm and the sum, [..., H] each. Both carry gradients.

    Raises:
        ValueError: shapes disagree or casting is unknown.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    check_norm("add_rms_norm", x, weight, casting)
    if x.shape != residual.shape:
        raise ValueError(
            f"add_rms_norm: residual must be as x, {list(x.shape)}, got {list(residual.shape)}"
        )
    chosen = _choose("add_rms_norm", backend, x, residual, weight)
    if chosen == "eager":
        return _eager.add_rms_norm(x, residual, weight, epsilon, offset, casting)
    out, total = _ops.add_rms_norm(x, residual, weight, epsilon, offset, casting, chosen)
    return out, total


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """SwiGLU (Shazeer 2020).

        F.silu(gate) * up

    Args:
        gate: [..., I]. Without ``up``, [..., 2 I]: the gate, then up, as one matrix product gives
            them; neither half is copied, and the gradient is one tensor too.
        up: [..., I].
        backend: "eager", "cpu", "triton"; None chooses by device.

    Returns:
        [..., I].

    Raises:
        ValueError: shapes disagree.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    return _gated("swiglu", "silu", gate, up, backend)


def geglu(
    gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh", backend: str | None = None
) -> Tensor:
    """GeGLU (Shazeer 2020).

        F.gelu(gate, approximate=approximate) * up

    Args:
        gate: as in ``swiglu``.
        up: as in ``swiglu``.
        backend: as in ``swiglu``.
        approximate: "tanh" or "none" (by erf).

    Returns:
        [..., I].

    Raises:
        ValueError: shapes disagree or approximate is unknown.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"geglu: approximate must be 'tanh' or 'none', got {approximate!r}")
    return _gated("geglu", "gelu_tanh" if approximate == "tanh" else "gelu", gate, up, backend)


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary positions (Su et al. 2021) in the layout of transformers' ``apply_rotary_pos_emb``.

        rotate = lambda x: torch.cat([-x[..., R // 2 :], x[..., : R // 2]], -1)
        rotate = lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)  # interleaved
        q * cos.unsqueeze(1) + rotate(q) * sin.unsqueeze(1)     # the same for k

    Positions in several dimensions (M-RoPE) are cos and sin whose sections come from different
    position ids.

    Args:
        q: [B, heads, T, D], any strides whose last is 1.
        k: as ``q``; it may have fewer heads.
        cos: [B or 1, T, R], R even, without gradients. Where R < D, the rest of every head is
            copied.
        sin: as ``cos``.
        interleaved: an entry's partner is its neighbour, as in GPT-J, Cohere and GLM; otherwise the
            entry R / 2 away, as in Llama.
        backend: "eager", "cpu", "triton"; None chooses by device.

    Returns:
        q and k rotated. The result of a transposed [B, T, heads, D] is one, too.

    Raises:
        ValueError: shapes or dtypes disagree, or cos or sin require gradients.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    check_rope(q, k, cos, sin)
    chosen = _choose("rope", backend, q, k, cos, sin)
    if chosen == "eager":
        return _eager.rope(q, k, cos, sin, interleaved)
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope: cos and sin must not require gradients except on backend='eager'")
    q_out, k_out = _ops.rope(q, k, cos, sin, interleaved, chosen)
    return q_out, k_out


def _gated(
    op: str, activation: str, gate: Tensor, up: Tensor | None, backend: str | None
) -> Tensor:
    if up is None and (gate.dim() == 0 or gate.shape[-1] % 2):
        raise ValueError(f"{op}: gate without up must be [..., 2 I], got {list(gate.shape)}")
    if up is not None and (up.shape != gate.shape or gate.dim() == 0):
        raise ValueError(
            f"{op}: gate and up must be [..., I] of one shape, "
            f"got {list(gate.shape)}, {list(up.shape)}"
        )
    chosen = _choose(op, backend, gate, up)
    if chosen == "eager":
        gate, up = gate.chunk(2, -1) if up is None else (gate, up)
        return _eager.gated(gate, up, activation)
    if up is None:
        result: Tensor = _ops.gated_packed(gate, activation, chosen)
        return result
    dtype = torch.promote_types(gate.dtype, up.dtype)
    result = _ops.gated(gate.to(dtype), up.to(dtype), activation, chosen)
    return result


def _choose(op: str, backend: str | None, first: Tensor, *others: Tensor | None) -> str:
    device = first.device
    other = None if first.dtype in _DTYPES else first.dtype
    for x in others:
        if x is not None:
            if x.device != device:
                raise ValueError(f"{op}: tensors must be on one device, got {device}, {x.device}")
            if x.dtype not in _DTYPES:
                other = x.dtype
    chosen: str = _backend_for(op, device.type, None if other is None else str(other), backend)
    return chosen


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _backend_for(op: str, device_type: str, other: str | None, backend: str | None) -> str:
    """The backend that runs; ``other`` is an input's dtype that no kernel takes, if any."""
    if other is None:
        return dispatch.choose(op, device_type, backend)
    asked = dispatch.asked(backend)
    if asked not in (None, "eager"):
        raise BackendUnavailableError(
            f"{op}: backend {asked!r} takes float32 and bfloat16, got {other}"
        )
    return "eager"
