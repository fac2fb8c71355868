"""The launches of the sketch's Triton kernels for one layer, for the gate and the tests of their code."""

from unittest import mock

import torch
from support.gpu.code import GpuLaunch

from merit_fast.kernels.sketch import _triton

KERNELS = ("linear_kernel", "rows_kernel", "ids_kernel", "add_kernel")
BF16, F32 = torch.bfloat16, torch.float32
KEY, PROJ_DIM, ROWS, COLUMNS = -(1 << 60) + 5, 65536, 1024, 2048


def launches() -> list[GpuLaunch]:
    return [
        linear("sketch of a layer, bf16", BF16),
        linear("sketch of a layer, bf16, scaled", BF16, scaled=True),
        linear("sketch of a layer, bf16, off the grid", BF16, COLUMNS - 1, (3, 5, 4096)),
        linear("sketch of a layer, fp32", F32),
        rows("sketch of rows, fp32, scaled", F32, scaled=True),
        rows("sketch of rows by id, bf16", BF16, by_id=True),
        rows("sketch of rows by id, fp32, scaled", F32, by_id=True, scaled=True),
        launched(
            "sketch: sum of splits",
            lambda: _sketch_linear(F32, COLUMNS, (0, 0, COLUMNS), False),
            "add_kernel",
        ),
    ]


def linear(name, dtype, columns=COLUMNS, place=(0, 0, COLUMNS), scaled=False) -> GpuLaunch:
    return launched(name, lambda: _sketch_linear(dtype, columns, place, scaled), "linear_kernel")


def rows(name, dtype, by_id=False, scaled=False) -> GpuLaunch:
    values, scale = (
        torch.zeros(2 * ROWS, COLUMNS, dtype=dtype),
        torch.ones(ROWS, COLUMNS) if scaled else None,
    )
    ids = torch.zeros(2 * ROWS, dtype=torch.int64) if by_id else None
    offsets, out = torch.tensor([0, ROWS, 2 * ROWS]), torch.zeros(2, PROJ_DIM)
    call = lambda: _triton.sketch_rows(values, offsets, ids, (0, 0, COLUMNS), KEY, out, scale)  # noqa: E731
    return launched(name, call, "ids_kernel" if by_id else "rows_kernel")


def _sketch_linear(dtype, columns, place, scaled) -> None:
    dy, x = torch.zeros(8, ROWS, dtype=dtype), torch.zeros(8, columns, dtype=dtype)
    scale, out = torch.ones(ROWS, columns) if scaled else None, torch.zeros(2, PROJ_DIM)
    _triton.sketch_linear(dy, x, torch.tensor([0, 4, 8]), place, KEY, out, scale)


def launched(name, call, kernel) -> GpuLaunch:
    """The launch of ``kernel`` among those that ``call`` asks for; nothing runs."""
    found = []

    class Recorder:
        def __init__(self, of):
            self.of = of

        def __getitem__(self, grid):
            return lambda *arguments, **options: found.append((self.of, arguments, options))

    with mock.patch.multiple(_triton, **{k: Recorder(k) for k in KERNELS}):
        call()
    ((arguments, options),) = [launch for of, *launch in found if of == kernel]
    return GpuLaunch(name, getattr(_triton, kernel), arguments, options)
