"""Search by brute force: inner products of many stored rows with a few vectors.

The search for the rows nearest to a target reads every stored row once, so memory sets its speed.
"""

import torch
from torch import Tensor

from merit_fast.kernels.search._ops import row_products as _row_products

__all__ = ["row_products"]

ROW_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def row_products(rows: Tensor, vectors: Tensor, *, backend: str | None = None) -> Tensor:
    """Inner product of every row with every vector. Not differentiable.

        out = rows.float() @ vectors.T

    Args:
        rows: [n, D] float16, bfloat16 or float32, each row contiguous; may lie in a memory-mapped
            file. Rows are read where they lie, and no copy of them in float32 is made as a whole.
        vectors: [m, D] float32 on the device of ``rows``. Strided ones are copied first.
        backend: "eager" (PyTorch), "cpu" (native), "triton"; None chooses by device.

    Returns:
        [n, m] float32. Products and sums in float32. On "cpu" the bits of an entry depend only on
        its row and its vector, for every ISA level and number of threads. Entries of a row that is
        not finite are not finite.

    Raises:
        ValueError: shapes, strides or devices disagree.
        TypeError: a dtype is none of those listed.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    if rows.dim() != 2 or vectors.dim() != 2 or rows.shape[1] != vectors.shape[1]:
        raise ValueError(
            "row_products: rows and vectors must be [n, D] and [m, D], "
            f"got {list(rows.shape)}, {list(vectors.shape)}"
        )
    if rows.dtype not in ROW_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in ROW_DTYPES)
        raise TypeError(f"row_products: rows: dtype must be one of {names}, got {rows.dtype}")
    if vectors.dtype != torch.float32:
        raise TypeError(f"row_products: vectors: dtype must be float32, got {vectors.dtype}")
    if rows.device != vectors.device:
        raise ValueError(
            f"row_products: vectors must be on {rows.device}, as rows, got {vectors.device}"
        )
    if rows.stride(1) != 1 and rows.numel() > len(rows):
        raise ValueError(
            "row_products: each row must be contiguous (stride 1 along D), "
            f"got strides {list(rows.stride())}"
        )
    products: Tensor = _row_products(rows, vectors.contiguous(), backend)
    return products
