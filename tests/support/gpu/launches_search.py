"""The launches of the search's Triton kernel, for the gate."""

import torch
from support.gpu.code import GpuLaunch

from merit_fast.kernels.search import _triton, _triton_kernels

WIDTH = 8192
ROW_COUNT = 4096


def launches() -> list[GpuLaunch]:
    return [
        products("search, fp16, one vector", torch.float16, 1),
        products("search, fp16, nine vectors", torch.float16, 9),
        products("search, bf16, one vector", torch.bfloat16, 1),
        products("search, fp32, one vector", torch.float32, 1),
        products("search, fp16, rows off the 16-byte grid", torch.float16, 1, WIDTH - 1),
    ]


def products(name: str, dtype: torch.dtype, num_vectors: int, width: int = WIDTH) -> GpuLaunch:
    rows = torch.zeros(2, width, dtype=dtype)
    vectors = torch.zeros(1, width)
    arguments = (
        rows,
        vectors,
        torch.zeros(16),
        ROW_COUNT,
        num_vectors,
        width,
        width,
        _triton.ROWS,
        min(_triton.VECTORS, num_vectors),
        _triton.step_of(rows, vectors),
    )
    return GpuLaunch(name, _triton_kernels.row_products_kernel, arguments, {"num_warps": 4})
