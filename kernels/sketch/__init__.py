"""CountSketch of gradients: one definition of bucket and sign for every entry of every parameter, no tables.

Definition, hash version 1. Parameter ``name`` of shape [R, C] (1-d: [1, C]; more: trailing dimensions flattened) is cut
in runs of 16 along C; run c of row r is block ``r * ceil(C / 16) + c``. With key = BLAKE2b-64 of (version, seed, name)
and h = SplitMix64(key, block), entry j of the run goes to

    out[16 * bucket + (j ^ lane)] += sign * g[r, 16 c + j]
    bucket = (h >> 32) * (proj_dim / 16) >> 32,  lane = (h >> 16) & 15,  sign = 1 - 2 * bit (j ^ lane) of h

Two entries of one run never collide, any others with probability 1 / proj_dim, so <sketch(g), sketch(h)> is an unbiased
estimate of <g, h> with at most the variance of Charikar, Chen & Farach-Colton (2002), ICALP. The sketch depends on
nothing else: not on batching, order of layers, shards, threads or device (up to the rounding of sums).
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from merit_fast.kernels import dispatch
from merit_fast.kernels.sketch import _eager

HASH_VERSION = 1
BLOCK = 16


@dataclass(frozen=True)
class CountSketch:
    """Which sketch: its width, a multiple of 16, and its seed. Sketches add and compare only when both agree."""

    proj_dim: int = 65536
    seed: int = 0

    def __post_init__(self) -> None:
        if self.proj_dim < BLOCK or self.proj_dim % BLOCK:
            raise ValueError(f"CountSketch: proj_dim must be a positive multiple of {BLOCK}, got {self.proj_dim}")

    def key(self, name: str) -> int:
        """64 bits that depend on hash version, seed and the parameter's name; signed, as torch wants it."""
        text = f"{HASH_VERSION}\n{self.seed}\n{name}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def flat_sketch(
    gradient: Tensor,
    name: str,
    sketch: CountSketch,
    *,
    out: Tensor | None = None,
    first_row: int = 0,
    row_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sketch gradients that exist already, one per batch entry (definition in the module's docstring).

    Args:
        gradient: [B, R, C] or [B, C] (one row), float32 or bfloat16; the last dimension contiguous. Column count C must
            be the parameter's own; R may be any part of its rows.
        name: the parameter's name, which selects its hash.
        sketch: width D and seed.
        out: [B, D] float32, contiguous, added to. None: new zeros.
        first_row: the parameter's row that ``gradient[:, 0]`` is.
        row_ids: [B, R] int64, the parameter's row of each gradient row; repeats add up. Overrides ``first_row``.
        backend: "eager", "cpu"; None chooses by device.

    Returns:
        [B, D] float32; ``out`` itself if given. Deterministic: sums run in row order.

    Raises:
        ValueError: shapes disagree.   TypeError: dtype not listed.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    if gradient.dim() == 2:
        gradient = gradient.unsqueeze(1)
    if gradient.dim() != 3:
        raise ValueError(f"flat_sketch: gradient must be [B, R, C] or [B, C], got {list(gradient.shape)}")
    if gradient.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"flat_sketch: gradient must be float32 or bfloat16, got {gradient.dtype}")
    if gradient.stride(-1) != 1 and gradient.shape[-1] > 1:
        raise ValueError("flat_sketch: the last dimension of gradient must be contiguous")
    if row_ids is not None and (row_ids.shape != gradient.shape[:2] or row_ids.dtype != torch.int64):
        raise ValueError(f"flat_sketch: row_ids must be int64 {list(gradient.shape[:2])}, got {list(row_ids.shape)}")
    out = _checked_out("flat_sketch", out, gradient, sketch)
    chosen = dispatch.choose("flat_sketch", gradient.device.type, backend)
    rows = None if row_ids is None else row_ids.contiguous()
    _sketch_rows(gradient, rows, first_row, sketch.key(name), out, chosen == "cpu")
    return out


def linear_grad_sketch(
    dy: Tensor,
    x: Tensor,
    name: str,
    sketch: CountSketch,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sketch the weight gradient of a linear layer, per example.

        out[b] += flat_sketch(dy[b].float().T @ x[b].float())

    The native kernel keeps tiles of the product in registers: dW is never stored.

    Args:
        dy: [B, T, O] gradient of the output, float32 or bfloat16. For a weight stored [I, O] (GPT-2's Conv1D) pass the
            input as ``dy`` and the output's gradient as ``x``.
        x: [B, T, I] input of the layer, same dtypes.
        name, sketch, out, backend: as in ``flat_sketch``; the parameter's shape is [O, I].

    Returns:
        [B, D] float32; ``out`` itself if given. Products and sums in float32.

    Raises:
        ValueError: shapes disagree.   BackendUnavailableError: ``backend`` cannot run here.
    """
    if dy.dim() != 3 or x.dim() != 3 or dy.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"linear_grad_sketch: dy and x must be [B, T, O] and [B, T, I], got {list(dy.shape)}, {list(x.shape)}"
        )
    out = _checked_out("linear_grad_sketch", out, dy, sketch)
    chosen = dispatch.choose("linear_grad_sketch", dy.device.type, backend)
    dy_t = dy.float().transpose(1, 2).contiguous()  # [B, O, T]
    x = F.pad(x.float(), (0, -x.shape[2] % BLOCK)).contiguous()  # [B, T, I to whole blocks]
    _sketch_linear(dy_t, x, sketch.key(name), out, chosen == "cpu")
    return out


def embedding_grad_sketch(
    dy: Tensor,
    token_ids: Tensor,
    name: str,
    sketch: CountSketch,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sketch the weight gradient of an embedding, per example: token t adds dy[b, t] to row token_ids[b, t].

    Args:
        dy: [B, T, C] gradient of the looked-up rows, float32 or bfloat16.
        token_ids: [B, T] int64.
        name, sketch, out, backend: as in ``flat_sketch``; the parameter's shape is [V, C].

    Returns:
        [B, D] float32; ``out`` itself if given. A head tied to the embedding adds into the same hash by its name.
    """
    return flat_sketch(dy.contiguous(), name, sketch, out=out, row_ids=token_ids, backend=backend)


def _checked_out(op: str, out: Tensor | None, gradient: Tensor, sketch: CountSketch) -> Tensor:
    shape = (len(gradient), sketch.proj_dim)
    if out is None:
        return torch.zeros(shape, dtype=torch.float32, device=gradient.device)
    if out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"{op}: out must be contiguous float32 {list(shape)}, got {out.dtype} {list(out.shape)}")
    return out


@torch.library.custom_op("merit_fast::sketch_rows", mutates_args={"out"})
def _sketch_rows(
    gradient: Tensor, row_ids: Tensor | None, first_row: int, key: int, out: Tensor, use_native: bool
) -> None:
    if not use_native:
        _eager.sketch_rows(gradient, row_ids, first_row, key, out)
        return
    native = dispatch.native_module()
    assert native is not None
    batch, rows, columns = gradient.shape
    native.sketch_rows(
        gradient.data_ptr(),
        gradient.dtype == torch.bfloat16,
        batch,
        rows,
        columns,
        gradient.stride(0),
        gradient.stride(1),
        0 if row_ids is None else row_ids.data_ptr(),
        first_row,
        key & 0xFFFFFFFFFFFFFFFF,
        out.shape[1],
        out.data_ptr(),
        torch.get_num_threads(),
    )


@_sketch_rows.register_fake
def _(gradient: Tensor, row_ids: Tensor | None, first_row: int, key: int, out: Tensor, use_native: bool) -> None:
    return None


@torch.library.custom_op("merit_fast::sketch_linear", mutates_args={"out"})
def _sketch_linear(dy_t: Tensor, x: Tensor, key: int, out: Tensor, use_native: bool) -> None:
    if not use_native:
        _eager.sketch_linear(dy_t, x, key, out)
        return
    native = dispatch.native_module()
    assert native is not None
    batch, rows, tokens = dy_t.shape
    native.sketch_linear(
        dy_t.data_ptr(),
        x.data_ptr(),
        batch,
        tokens,
        rows,
        x.shape[2],
        key & 0xFFFFFFFFFFFFFFFF,
        out.shape[1],
        out.data_ptr(),
        torch.get_num_threads(),
    )


@_sketch_linear.register_fake
def _(dy_t: Tensor, x: Tensor, key: int, out: Tensor, use_native: bool) -> None:
    return None
