"""Shapes and dtypes that the layers refuse, in words."""

from torch import Tensor

CASTINGS = ("llama", "gemma")


def check_norm(op: str, x: Tensor, weight: Tensor | None, casting: str) -> None:
    if casting not in CASTINGS:
        raise ValueError(f"{op}: casting must be one of {', '.join(CASTINGS)}, got {casting!r}")
    if x.dim() == 0 or (weight is not None and weight.shape != x.shape[-1:]):
        got = None if weight is None else list(weight.shape)
        raise ValueError(f"{op}: x must be [..., H] and weight [H], got {list(x.shape)}, {got}")


def check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"rope: q and k must be [B, heads, T, D], got {list(q.shape)}, {list(k.shape)}"
        )
    batch, _, tokens, width = q.shape
    fits = (
        cos.dim() == 3
        and cos.shape == sin.shape
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == tokens
    )
    if not fits or cos.shape[2] % 2 or cos.shape[2] > width:
        raise ValueError(
            f"rope: cos and sin must be [{batch} or 1, {tokens}, R] with an even R <= {width}, "
            f"got {list(cos.shape)}, {list(sin.shape)}"
        )
    if q.dtype != k.dtype or cos.dtype != sin.dtype:
        raise ValueError(
            "rope: q and k, cos and sin must have one dtype each, "
            f"got {q.dtype}, {k.dtype}, {cos.dtype}, {sin.dtype}"
        )
