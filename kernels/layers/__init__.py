"""The parts of a transformer between its matrix products: norms, gated activations, rotary positions."""

from torch import Tensor

from merit_fast.kernels.layers import _eager

__all__ = ["add_rms_norm", "geglu", "rms_norm", "rope", "swiglu"]


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0, casting: str = "llama", backend: str | None = None
) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019) over the last dimension, as transformers computes it.

        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
        y.to(x.dtype) * (offset + weight)                   # casting="llama"
        (y * (offset + weight.float())).to(x.dtype)         # casting="gemma", whose offset is 1
    """
    return _eager.rms_norm(x, weight, epsilon, offset, casting)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    offset: float = 0.0,
    casting: str = "llama",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``total = residual + x; return rms_norm(total, ...), total`` in one pass."""
    total = residual + x
    return _eager.rms_norm(total, weight, epsilon, offset, casting), total


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """``F.silu(gate) * up`` (Shazeer 2020)."""
    return _eager.swiglu(gate, up)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh", backend: str | None = None) -> Tensor:
    """``F.gelu(gate, approximate=approximate) * up`` (Shazeer 2020)."""
    return _eager.geglu(gate, up, approximate)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Rotary positions (Su et al. 2021) in the layout of transformers' ``apply_rotary_pos_emb``.

        rotate = lambda x: torch.cat([-x[..., R // 2 :], x[..., : R // 2]], -1)
        q * cos.unsqueeze(1) + rotate(q) * sin.unsqueeze(1)     # the same for k

    Args:
        q, k: [B, heads, T, R], any strides whose last is 1; k may have fewer heads.
        cos, sin: [B or 1, T, R].
    """
    return _eager.rope(q, k, cos, sin)
