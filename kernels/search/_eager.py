"""The reference of the search in plain PyTorch, on any device."""

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22  # of rows that are float32 at a time


def row_products(rows: Tensor, vectors: Tensor) -> Tensor:
    """[n, m] float32: rows [n, D], in chunks of float32, times the transpose of vectors [m, D]."""
    out = rows.new_empty(len(rows), len(vectors), dtype=torch.float32)
    step = max(1, _CHUNK_ELEMENTS // max(1, rows.shape[1]))
    for first in range(0, len(rows), step):
        torch.mm(rows[first : first + step].float(), vectors.T, out=out[first : first + step])
    return out
