"""CountSketch of gradients: one definition of bucket and sign for every entry, without tables.

Definition, hash version 3. Parameter ``name``, hashed as a matrix [R, C] (``matrix_shape``), is cut
into tiles of 64 x 64. With M = proj_dim / 4096 buckets, p is the largest divisor of M with
p^2 <= M, and q = M / p; p x q tiles are a group. Tile (I, J), of A = ceil(C / 64) across, has the
number t = I * A + J, lies in group (P, Q) = (I // p, J // q), of W = ceil(A / q) across, and
g = P * W + Q. With key = BLAKE2b-64 of (version, seed, name), h(n) = SplitMix64(key, n) and
``out`` viewed as [M, 64, 64], entry (i, j) of the tile is added to

    out[bucket, i ^ x, j ^ y] += row_sign * column_sign * g[64 I + i, 64 J + j]
    bucket = (I + r) mod p * q + (J + c) mod q
    r = (h(8 g + 3) >> 32) * p >> 32
    c = (h(8 g + 3) & (2^32 - 1)) * q >> 32
    x = h(8 (I * W + Q) + 4) & 56 | h(8 t) & 7
    y = h(8 (P * A + J) + 5) & 56 | h(8 t) >> 8 & 7
    row_sign = 1 - 2 * bit i of h(8 t + 1)
    column_sign = 1 - 2 * bit j of h(8 t + 2)

Two entries of one group never collide; any others collide with probability 1 / proj_dim and with
independent signs. So <sketch(g), sketch(h)> is an unbiased estimate of <g, h> with at most the
variance of Charikar, Chen & Farach-Colton (2002), ICALP. Batching, order of layers, shards, threads
and device change nothing but the rounding of sums. A rectangle of buckets is a sum over groups of
rectangles of dY^T X, whose rows and columns lie in runs of 8: ordinary matrix products.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from merit_fast.kernels.sketch._checks import check_scale, checked_out, checked_place, end_to_end
from merit_fast.kernels.sketch._eager import HASH_VERSION, hash_key
from merit_fast.kernels.sketch._ops import run_linear, run_rows, run_sums
from merit_fast.kernels.sketch._target import BUCKET, matrix_shape

__all__ = [
    "HASH_VERSION",
    "CountSketch",
    "embedding_grad_sketch",
    "flat_sketch",
    "linear_grad_sketch",
    "matrix_shape",
    "vector_grad_sketch",
]


@dataclass(frozen=True)
class CountSketch:
    """A sketch's width, a multiple of 4096, and its seed.

    Sketches can be added and compared only if both agree.
    """

    proj_dim: int = 65536
    seed: int = 0

    def __post_init__(self) -> None:
        if self.proj_dim < BUCKET or self.proj_dim % BUCKET:
            raise ValueError(
                f"CountSketch: proj_dim must be a positive multiple of {BUCKET}, "
                f"got {self.proj_dim}"
            )

    def key(self, name: str) -> int:
        """64 bits of hash version, seed and the parameter's name; signed, as torch takes them."""
        return hash_key(self.seed, name)


def flat_sketch(
    gradient: Tensor,
    name: str,
    sketch: CountSketch,
    *,
    row_ids: Tensor | None = None,
    first_row: int = 0,
    first_column: int = 0,
    columns: int | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """CountSketch (Charikar et al. 2002) of gradients that exist already, one per batch entry.

        out[b] += sketch(scale * gradient[b])               # as the module's docstring defines it

    Args:
        gradient: [B, R, C] or [B, C] (one row); that of a vector in its ``matrix_shape``. float32
            and bfloat16 are read where they lie; other dtypes are converted to float32 first.
        name: the parameter's name, which selects its hash.
        sketch: width D and seed.
        row_ids: [B, R] int64, the parameter's row of each gradient row; repeats add up. Overrides
            ``first_row``.
        first_row: row at which a shard begins in the parameter.
        first_column: column at which a shard begins.
        columns: column count of the whole parameter. None: the shard's last column is the last.
        scale: [R, C] float32, which multiplies every gradient first. With ``row_ids`` it has all
            rows of the parameter.
        out: [B, D] float32, contiguous, added to. None: new zeros.
        backend: "eager", "cpu", "triton"; None chooses by device.

    Returns:
        [B, D] float32; ``out`` itself if given. Deterministic: sums run in the order of the rows.

    Raises:
        ValueError: shapes disagree.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    if gradient.dim() == 2:
        gradient = gradient.unsqueeze(1)
    if gradient.dim() != 3:
        raise ValueError(
            f"flat_sketch: gradient must be [B, R, C] or [B, C], got {list(gradient.shape)}"
        )
    if row_ids is not None and (
        row_ids.shape != gradient.shape[:2] or row_ids.dtype != torch.int64
    ):
        raise ValueError(
            f"flat_sketch: row_ids must be int64 {list(gradient.shape[:2])}, "
            f"got {row_ids.dtype} {list(row_ids.shape)}"
        )
    place = checked_place("flat_sketch", gradient.shape[2], first_row, first_column, columns)
    out = checked_out("flat_sketch", out, len(gradient), gradient.device, sketch.proj_dim)
    rows, offsets = end_to_end("flat_sketch", gradient, None)
    ids = None
    if row_ids is None:
        check_scale("flat_sketch", scale, gradient.shape[1:])
    else:
        check_scale("flat_sketch", scale, (-1, gradient.shape[2]))
        ids = row_ids.reshape(-1).contiguous()
        place = (0, *place[1:])
    run_rows(rows, offsets, ids, *place, sketch.seed, name, scale, out, backend)
    return out


def vector_grad_sketch(
    dy: Tensor,
    name: str,
    sketch: CountSketch,
    *,
    x: Tensor | None = None,
    epsilon: float | None = None,
    cu_seqlens: Tensor | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sketch the gradient of a bias, or of a scale that multiplies ``x``, per example.

        vector = (dy[b] * x[b]).float().sum(0)              # a bias: no x
        out[b] += flat_sketch(vector.view(1, *matrix_shape([C])), name, sketch)[0]

    Args:
        dy: [B, T, C] gradient of the output; [N, C] with ``cu_seqlens``.
        x: shaped as dy, the factor of the parameter.
        epsilon: RMSNorm's: the parameter multiplies x * rsqrt(mean(x ** 2, -1) + epsilon). None: x
            itself.
        cu_seqlens: as in ``linear_grad_sketch``.
        name: as in ``flat_sketch``; the parameter's shape is [C].
        sketch: as in ``flat_sketch``.
        scale: in the ``matrix_shape`` of [C], as in ``flat_sketch``.
        out: as in ``flat_sketch``.
        backend: as in ``flat_sketch``.

    Returns:
        [B, D] float32; ``out`` itself if given. Sums in float32.

    Raises:
        ValueError: shapes disagree.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    if x is not None and x.shape != dy.shape:
        raise ValueError(
            f"vector_grad_sketch: x must be as dy, {list(dy.shape)}, got {list(x.shape)}"
        )
    dy, offsets = end_to_end("vector_grad_sketch", dy, cu_seqlens)
    if x is not None:
        x, _ = end_to_end("vector_grad_sketch", x, cu_seqlens)
    sums = run_sums(dy, x, offsets, epsilon, backend)
    matrices = sums.view(len(sums), *matrix_shape(sums.shape[1:]))
    return flat_sketch(matrices, name, sketch, scale=scale, out=out, backend=backend)


def linear_grad_sketch(
    dy: Tensor,
    x: Tensor,
    name: str,
    sketch: CountSketch,
    *,
    cu_seqlens: Tensor | None = None,
    first_row: int = 0,
    first_column: int = 0,
    columns: int | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sketch the weight gradient of a linear layer, per example.

        out[b] += flat_sketch(dy[b].float().T @ x[b].float(), name, sketch)

    The kernels keep blocks of the product in registers: dW is never stored.

    Args:
        dy: [B, T, O] gradient of the output, float32 or bfloat16 (others are converted to float32).
            For a weight stored [I, O] (GPT-2's Conv1D) pass the input as ``dy`` and the output's
            gradient as ``x``.
        x: [B, T, I] input of the layer.
        cu_seqlens: [B + 1] int64, for packed sequences: dy is [N, O], x [N, I], and example b has
            the tokens cu_seqlens[b]..cu_seqlens[b + 1] - 1.
        first_row: as in ``flat_sketch``, for a shard (tensor parallel) or a slice of fused weights
            (q, k, v).
        first_column: as in ``flat_sketch``.
        columns: as in ``flat_sketch``.
        scale: [O, I] float32, which multiplies dW, entry by entry, before it is hashed.
        name: as in ``flat_sketch``; the parameter's shape is [O, I].
        sketch: as in ``flat_sketch``.
        out: as in ``flat_sketch``.
        backend: as in ``flat_sketch``, or "cuda".

    Returns:
        [B, D] float32; ``out`` itself if given. Products and sums in float32.

    Raises:
        ValueError: shapes disagree.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    dims = 3 if cu_seqlens is None else 2
    if dy.dim() != dims or x.dim() != dims or dy.shape[:-1] != x.shape[:-1]:
        wanted = "[B, T, O] and [B, T, I]" if cu_seqlens is None else "[N, O] and [N, I]"
        raise ValueError(
            f"linear_grad_sketch: dy and x must be {wanted}, got {list(dy.shape)}, {list(x.shape)}"
        )
    place = checked_place("linear_grad_sketch", x.shape[-1], first_row, first_column, columns)
    dy, offsets = end_to_end("linear_grad_sketch", dy, cu_seqlens)
    x, _ = end_to_end("linear_grad_sketch", x, cu_seqlens)
    out = checked_out("linear_grad_sketch", out, len(offsets) - 1, dy.device, sketch.proj_dim)
    check_scale("linear_grad_sketch", scale, (dy.shape[1], x.shape[1]))
    run_linear(dy, x, offsets, *place, sketch.seed, name, scale, out, backend)
    return out


def embedding_grad_sketch(
    dy: Tensor,
    token_ids: Tensor,
    name: str,
    sketch: CountSketch,
    *,
    cu_seqlens: Tensor | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sketch the weight gradient of an embedding, per example.

        weight_grad[b, token_ids[b, t]] += dy[b, t];  out[b] += flat_sketch(weight_grad[b], name,
        sketch)

    Args:
        dy: [B, T, C] gradient of the looked-up rows; [N, C] with ``cu_seqlens``.
        token_ids: [B, T] int64; [N] with ``cu_seqlens``.
        cu_seqlens: as in ``linear_grad_sketch``.
        name: as in ``flat_sketch``; the parameter's shape is [V, C].
        sketch: as in ``flat_sketch``.
        scale: [V, C], as in ``flat_sketch``.
        out: as in ``flat_sketch``.
        backend: as in ``flat_sketch``.

    Returns:
        [B, D] float32; ``out`` itself if given. A tied head adds to the same hash under the same
        name.

    Raises:
        ValueError: shapes disagree.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    if dy.shape[:-1] != token_ids.shape or token_ids.dtype != torch.int64:
        raise ValueError(
            f"embedding_grad_sketch: token_ids must be int64 {list(dy.shape[:-1])}, "
            f"got {token_ids.dtype} {list(token_ids.shape)}"
        )
    place = checked_place("embedding_grad_sketch", dy.shape[-1], 0, 0, None)
    rows, offsets = end_to_end("embedding_grad_sketch", dy, cu_seqlens)
    out = checked_out("embedding_grad_sketch", out, len(offsets) - 1, dy.device, sketch.proj_dim)
    check_scale("embedding_grad_sketch", scale, (-1, dy.shape[-1]))
    ids = token_ids.reshape(-1).contiguous()
    run_rows(rows, offsets, ids, *place, sketch.seed, name, scale, out, backend)
    return out
