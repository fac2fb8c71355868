"""Launches of the sketch's Triton kernels for one layer, for the gate and the tests of code."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from support.gpu.code import GpuLaunch

from merit_fast.kernels.sketch import _triton
from merit_fast.kernels.sketch._target import SketchTarget

KERNELS = ("linear_kernel", "rows_kernel", "ids_kernel", "add_kernel")
BF16 = torch.bfloat16
F32 = torch.float32
KEY = -(1 << 60) + 5
PROJ_DIM = 65536
ROWS = 1024
COLUMNS = 2048


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


def linear(
    name: str,
    dtype: torch.dtype,
    columns: int = COLUMNS,
    place: tuple[int, int, int] = (0, 0, COLUMNS),
    scaled: bool = False,
) -> GpuLaunch:
    return launched(name, lambda: _sketch_linear(dtype, columns, place, scaled), "linear_kernel")


def rows(name: str, dtype: torch.dtype, by_id: bool = False, scaled: bool = False) -> GpuLaunch:
    values = torch.zeros(2 * ROWS, COLUMNS, dtype=dtype)
    scale = torch.ones(ROWS, COLUMNS) if scaled else None
    ids = torch.zeros(2 * ROWS, dtype=torch.int64) if by_id else None
    offsets = torch.tensor([0, ROWS, 2 * ROWS])
    target = SketchTarget(offsets, 0, 0, COLUMNS, KEY, scale, torch.zeros(2, PROJ_DIM))
    kernel = "ids_kernel" if by_id else "rows_kernel"
    return launched(name, lambda: _triton.sketch_rows(values, ids, target), kernel)


def _sketch_linear(
    dtype: torch.dtype, columns: int, place: tuple[int, int, int], scaled: bool
) -> None:
    dy = torch.zeros(8, ROWS, dtype=dtype)
    x = torch.zeros(8, columns, dtype=dtype)
    scale = torch.ones(ROWS, columns) if scaled else None
    offsets = torch.tensor([0, 4, 8])
    target = SketchTarget(offsets, *place, KEY, scale, torch.zeros(2, PROJ_DIM))
    _triton.sketch_linear(dy, x, target)


def launched(name: str, call: Callable[[], None], kernel: str) -> GpuLaunch:
    """The launch of ``kernel`` among those that ``call`` asks for; nothing runs."""
    recorded: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        def __init__(self, of: str) -> None:
            self.of = of

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, **options: recorded.append((self.of, arguments, options))

    recorders: dict[str, Any] = {name: Recorder(name) for name in KERNELS}
    with mock.patch.multiple(_triton, **recorders):
        call()
    ((_, arguments, options),) = [launch for launch in recorded if launch[0] == kernel]
    return GpuLaunch(name, getattr(_triton, kernel), arguments, options)
