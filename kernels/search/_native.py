"""The search's call of merit_fast._C: where tensors lie becomes addresses and strides."""

import torch
from torch import Tensor

from merit_fast.kernels import dispatch

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def row_products(rows: Tensor, vectors: Tensor) -> Tensor:
    """[n, m] float32: rows [n, D] times the transpose of contiguous vectors [m, D]."""
    native = dispatch.native()
    out = torch.empty(len(rows), len(vectors), dtype=torch.float32)
    native.row_products(
        rows=rows.data_ptr(),
        type=DTYPE_CODES[rows.dtype],
        count=len(rows),
        width=rows.shape[1],
        stride=rows.stride(0),
        vectors=vectors.data_ptr(),
        num_vectors=len(vectors),
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out
