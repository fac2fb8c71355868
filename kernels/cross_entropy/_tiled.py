"""The head in tiles of its vocabulary: which rows, which columns, which buffers."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.cross_entropy._arguments import LogitForm
from merit_fast.kernels.labels import IGNORED_LABEL

# Most bytes of a tile's temporaries; kept logits take KEPT_TILES times as many more.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
KEPT_TILES = 3
# Narrower products are slow: many tokens take up to 4 TILE_BYTES, then come in chunks.
FEWEST_COLUMNS = 1024
MOST_ROWS = 3072  # of a native pass: more leave the L2 cache, where torch is as fast
STEP = 64  # divides the columns of a tile, as vectors and the sketch's tiles require


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

    ``epilogue`` is the module with ``update`` and ``gradient``; ``first_row`` is the word of the
    vocabulary to which the first row of ``weight`` belongs. ``in_one_call``: native passes are
    available for the whole head, and nobody needs the gradient of its logits.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        form: LogitForm,
        epilogue: ModuleType,
        first_row: int = 0,
        in_one_call: bool = False,
    ) -> None:
        self.rows = (labels != IGNORED_LABEL).nonzero().squeeze(1)
        self.dtype = work_dtype(weight)
        trainable = hidden if len(self.rows) == len(labels) else hidden[self.rows]
        self.hidden = trainable.to(self.dtype)
        self.labels = labels[self.rows]
        self.weight = weight
        self.form = form
        self.epilogue = epilogue
        self.first_row = first_row
        self.in_one_call = in_one_call and len(self.rows) <= MOST_ROWS
        self.bias = None if bias is None else bias.float().contiguous()
        if self.in_one_call:
            return
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
    ) -> tuple[int, Tensor | None, LogitForm, Tensor]:
        """Arguments of both epilogues next to the logits."""
        bias = None if self.bias is None else self.bias[first:last]
        return self.first_row + first, bias, self.form, self.labels[rows]


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
    return chunk, max(1, -(-vocabulary // (tiles * STEP))) * STEP
