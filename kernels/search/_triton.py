"""Launches the search's Triton kernel. Nothing waits for the GPU."""

import torch
from torch import Tensor

from merit_fast.kernels._devices import device_of
from merit_fast.kernels.search._triton_kernels import row_products_kernel

ROWS = 8  # of a program
COLUMNS = 512  # of a step; 4 warps read 128 bits a thread and row
FEW_COLUMNS = 256  # where rows begin off the grid of 16 bytes: loads by element take registers
VECTORS = 2  # of a program, where there are several


def row_products(rows: Tensor, vectors: Tensor) -> Tensor:
    """[n, m] float32: rows [n, D] times the transpose of contiguous vectors [m, D]."""
    count, width = rows.shape
    out = torch.empty(count, len(vectors), dtype=torch.float32, device=rows.device)
    of_program = min(VECTORS, len(vectors))
    columns = step_of(rows, vectors)
    if out.numel():
        programs = -(-count // ROWS) * -(-len(vectors) // of_program)
        with device_of(out):
            row_products_kernel[(programs,)](
                rows, vectors, out, count, len(vectors), width, rows.stride(0),
                ROWS, of_program, columns, num_warps=4,
            )  # fmt: skip
    return out


def step_of(rows: Tensor, vectors: Tensor) -> int:
    """Columns of a step, for rows and vectors where they lie."""
    places = (
        rows.data_ptr(),
        rows.stride(0) * rows.itemsize,
        vectors.data_ptr(),
        rows.shape[1] * 4,
    )
    return FEW_COLUMNS if any(place % 16 for place in places) else COLUMNS
