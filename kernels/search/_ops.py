"""The search's custom op, which chooses the backend when it runs."""

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels.search import _eager, _native


@torch.library.custom_op("merit_fast::row_products", mutates_args=())
def row_products(rows: Tensor, vectors: Tensor, backend: str | None) -> Tensor:
    """[n, m] float32: inner products of rows [n, D] and contiguous vectors [m, D]."""
    chosen = dispatch.choose("row_products", rows.device.type, backend)
    if chosen == "triton":
        from merit_fast.kernels.search import _triton

        return _triton.row_products(rows, vectors)
    if chosen == "cpu":
        return _native.row_products(rows, vectors)
    return _eager.row_products(rows, vectors)


@row_products.register_fake
def _(rows: Tensor, vectors: Tensor, backend: str | None) -> Tensor:
    return rows.new_empty(rows.shape[0], vectors.shape[0], dtype=torch.float32)
