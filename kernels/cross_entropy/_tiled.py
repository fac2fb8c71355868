"""Linear + cross-entropy by tiles of the vocabulary: torch's products, a backend's epilogues.

Forward: the logits of a tile are hidden @ W[tile].T, for the trainable rows; ``update`` adds them
    to each row's
maximum, sum of exponentials and label's logit. Backward: the logits are computed again (the first
ones may have been kept), ``gradient`` turns them into their gradient d, then dW[tile] = d.T @
hidden, written once, and d_hidden += d @ W[tile]. Very many tokens come in chunks inside a tile, so
that W[tile] and dW[tile] stay in the cache.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.cross_entropy._arguments import Batch, HeadSketch, LossTerms
from merit_fast.kernels.cross_entropy._eager import trainable_offsets
from merit_fast.kernels.labels import IGNORED_LABEL
from merit_fast.kernels.sketch import linear_grad_sketch

# Most bytes of a tile's temporaries; kept logits take KEPT_TILES times as many more.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
KEPT_TILES = 3
# Narrower products are slow: many tokens take up to 4 TILE_BYTES, then come in chunks.
FEWEST_COLUMNS = 1024
STEP = 64  # divides the columns of a tile, as vectors and the sketch's tiles require
# torch.mm(out_dtype=), from torch 2.8 on.
WIDE_PRODUCTS = "dtype" in torch.ops.aten.mm.overloads()  # type: ignore[no-untyped-call]


def work_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of products and logits: float32 on CPUs without bf16 instructions.

    There torch multiplies bf16 hundreds of times slower.
    """
    slow = weight.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if slow else weight.dtype


def kept_numel(hidden: Tensor, weight: Tensor) -> Any:
    """Number of logits kept for the backward pass: as many as fit next to other temporaries."""
    item = work_dtype(weight).itemsize
    tokens = hidden.shape[0]
    tile = _tile_bytes(weight)
    least: Any = torch.sym_min
    most: Any = torch.sym_max
    others = least(tile, tokens * 4 * FEWEST_COLUMNS * item) + 3 * item * tokens * weight.shape[1]
    return least(tokens * weight.shape[0], most(0, KEPT_TILES * tile - others) // item)


def _tile_bytes(weight: Tensor) -> int:
    return TILE_BYTES.get(weight.device.type, TILE_BYTES["cpu"])


class TiledHead:
    """The trainable rows of a batch, and the tiles of their product with the head.

    ``backend`` names the backend of the sketch; ``epilogue`` is the module with ``update`` and
    ``gradient``.
    """

    def __init__(self, batch: Batch, terms: LossTerms, backend: str, epilogue: ModuleType) -> None:
        hidden, weight, bias, labels = batch.hidden, batch.weight, batch.bias, batch.labels
        self.rows = (labels != IGNORED_LABEL).nonzero().squeeze(1)
        self.offsets = trainable_offsets(labels, batch.offsets)
        self.dtype = work_dtype(weight)
        trainable = hidden if len(self.rows) == len(labels) else hidden[self.rows]
        self.hidden = trainable.to(self.dtype)
        self.labels = labels[self.rows]
        self.weight = weight
        self.terms = terms
        self.backend = backend
        self.epilogue = epilogue
        self.bias = None if bias is None else bias.float().contiguous()
        self.chunk, self.columns = tile_shape(len(self.rows), weight, self.dtype)
        self.logits = hidden.new_empty(self.chunk * self.columns, dtype=self.dtype)
        wide = self.columns * weight.shape[1] if self.dtype != weight.dtype else 0
        self.wide = hidden.new_empty(wide, dtype=self.dtype)

    def __len__(self) -> int:
        return len(self.rows)

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """First word, last word + 1, and their rows of W in the dtype of products."""
        for first in range(0, len(self.weight), self.columns):
            last = min(first + self.columns, len(self.weight))
            tile = self.weight[first:last]
            if self.dtype != tile.dtype:
                tile = self.wide_buffer(last - first).copy_(tile)
            yield first, last, tile

    def wide_buffer(self, columns: int) -> Tensor:
        return self.wide[: columns * self.weight.shape[1]].view(columns, -1)

    def chunks(self) -> Iterator[slice]:
        for start in range(0, len(self), self.chunk):
            yield slice(start, min(start + self.chunk, len(self)))

    def buffer(self, rows: slice, columns: int) -> Tensor:
        return self.logits[: (rows.stop - rows.start) * columns].view(-1, columns)

    def kept(self, kept: Tensor, first: int, last: int) -> Tensor | None:
        """The tile's logits in ``kept``, or None: the first tiles lie there, as many as fit."""
        start = first * len(self)
        stop = last * len(self)
        if self.chunk < len(self) or stop > len(kept):
            return None
        return kept[start:stop].view(-1, last - first)

    def of_tile(
        self, first: int, last: int, rows: slice
    ) -> tuple[int, Tensor | None, float | None, Tensor]:
        """Arguments of both epilogues next to the logits."""
        bias = None if self.bias is None else self.bias[first:last]
        return first, bias, self.terms.softcap, self.labels[rows]


def tile_shape(rows: int, weight: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Rows of a chunk and columns of a tile; chunks are about equal, and so are tiles."""
    vocabulary, width = weight.shape
    limit = _tile_bytes(weight)
    chunk = max(1, min(rows, 4 * limit // (dtype.itemsize * FEWEST_COLUMNS)))
    chunk = -(-rows // -(-max(rows, 1) // chunk))
    column_bytes = dtype.itemsize * chunk
    # W widened, and the sum of dW over chunks.
    column_bytes += 4 * width * ((dtype != weight.dtype) + (chunk < rows))
    in_cache = 2 * limit // (dtype.itemsize * max(width, 1))  # W[tile] is read by two products
    most = max(FEWEST_COLUMNS, min(limit // max(column_bytes, 1), in_cache) // STEP * STEP)
    tiles = max(1, -(-vocabulary // most))
    return chunk, -(-vocabulary // (tiles * STEP)) * STEP


def forward(head: TiledHead, kept: Tensor, softmax: Tensor) -> Tensor:
    """float64 losses of the trainable rows [M]; fills softmax[:, :M] (``_ops``)."""
    state = torch.zeros(4, len(head), dtype=torch.float64, device=head.hidden.device)
    state[0] = -torch.inf
    filled = 0
    for first, last, weight in head.tiles() if len(head) else ():
        keep = head.kept(kept, first, last)
        filled = filled if keep is None else last * len(head)
        for rows in head.chunks():
            logits = head.buffer(rows, last - first) if keep is None else keep
            torch.mm(head.hidden[rows], weight.T, out=logits)
            head.epilogue.update(logits, *head.of_tile(first, last, rows), state[:, rows])
    kept[filled:] = 0  # the result of an op is defined
    softmax[:, : len(head)] = state[:2]
    top, total, target, plain = state
    lse = top + total.log()
    smoothing = head.terms.label_smoothing
    loss: Tensor = lse - (1 - smoothing) * target
    if smoothing:
        loss = loss - smoothing / len(head.weight) * plain
    return loss + head.terms.z_loss * lse**2 if head.terms.z_loss else loss


def backward(
    head: TiledHead,
    kept: Tensor,
    softmax: Tensor,
    row_weights: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    sketch: HeadSketch | None,
) -> None:
    """Fills the gradients of the sum of row_weights [N] * losses, except those that are None."""
    terms = _gradient_terms(head, softmax, row_weights)
    sums = None if d_hidden is None else torch.zeros_like(head.hidden, dtype=torch.float32)
    for first, last, weight in head.tiles() if len(head) else ():
        keep = head.kept(kept, first, last)
        total = None
        for rows in head.chunks():
            d = logits = head.buffer(rows, last - first)
            if keep is None:
                torch.mm(head.hidden[rows], weight.T, out=logits)
            else:
                logits = keep
            head.epilogue.gradient(logits, *head.of_tile(first, last, rows), terms[:, rows], d)
            if sums is not None:
                add_product(sums[rows], d, weight)
            if d_bias is not None:
                d_bias[first:last] += d.sum(0, dtype=torch.float32)
            if sketch is not None:
                _add_sketch(sketch, head, d, rows, first)
            if d_weight is not None:
                total = _weight_gradient(head, d, rows, d_weight[first:last], total)
        if d_weight is not None and total is not None:
            d_weight[first:last] = total
    if d_hidden is not None and sums is not None:
        d_hidden.zero_()[head.rows] = sums.to(d_hidden.dtype)


def _gradient_terms(head: TiledHead, softmax: Tensor, row_weights: Tensor) -> Tensor:
    """[4, M] float32: shift, factor, target, uniform of ``gradient``."""
    top, total = softmax[:, : len(head)]
    weights = row_weights[head.rows].double()
    smoothing = head.terms.label_smoothing
    factor = weights * (1 + 2 * head.terms.z_loss * (top + total.log())) / total
    return torch.stack(
        [top, factor, weights * (1 - smoothing), weights * (smoothing / len(head.weight))]
    ).float()


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to ``out`` in float32: the product is never rounded to bf16 before it is added.

    torch has bf16 products with a float32 result on GPUs only. Elsewhere a second product gives the
    remainder of the first one's rounding: torch subtracts the first before it rounds. On a CPU with
    bf16 instructions this is faster, and takes less memory, than widening both factors.
    """
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    elif a.is_cuda and WIDE_PRODUCTS:
        out += torch.mm(a, b, out_dtype=torch.float32)
    else:
        rounded = torch.mm(a, b)
        out += rounded
        out += torch.addmm(rounded, a, b, beta=-1)


def _weight_gradient(
    head: TiledHead, d: Tensor, rows: slice, out: Tensor, total: Tensor | None
) -> Tensor | None:
    """dW[tile] of a chunk: written to ``out`` if it is the only one, else added to the result.

    W[tile] is not needed any more, so the product takes the memory of its widened copy.
    """
    if head.chunk == len(head) and head.dtype == out.dtype:
        torch.mm(d.T, head.hidden[rows], out=out)
        return None
    if head.chunk == len(head):
        return torch.mm(d.T, head.hidden[rows], out=head.wide_buffer(len(out)))
    if total is None:
        total = torch.zeros_like(out, dtype=torch.float32)
    add_product(total, d.T, head.hidden[rows])
    return total


def _add_sketch(sketch: HeadSketch, head: TiledHead, d: Tensor, rows: slice, first: int) -> None:
    offsets = (head.offsets - rows.start).clamp(0, rows.stop - rows.start)
    linear_grad_sketch(
        d, head.hidden[rows], sketch.name, sketch.sketch,
        cu_seqlens=offsets, first_row=first, out=sketch.out, backend=head.backend,
    )  # fmt: skip
