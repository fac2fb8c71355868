"""Calls of the sketch's Triton kernels and of the reference, for tests in Triton's interpreter."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from merit_fast.kernels.sketch import _eager, _triton
from merit_fast.kernels.sketch._target import SketchTarget

KEY = -0x123456789ABCDEF
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Buckets, rows, columns, (first row, first column, parameter's columns), tokens of the examples.
CASES = {
    "one tile": (1, 64, 64, (0, 0, 64), [64]),
    "one entry": (2, 1, 1, (0, 0, 1), [1, 3]),
    "ragged": (4, 70, 37, (0, 0, 37), [33, 1, 100]),
    "tokens that fill no block": (1, 32, 16, (0, 0, 16), [15, 16, 17, 65]),
    "examples without tokens": (3, 40, 100, (0, 0, 100), [0, 5, 0]),
    "no tokens at all": (2, 40, 100, (0, 0, 100), [0, 0]),
    "more buckets than tiles": (11, 65, 130, (0, 0, 130), [9]),
    "shard from a tile's border": (8, 64, 192, (128, 256, 1000), [5]),
    "shard that begins in a tile": (4, 100, 80, (37, 91, 200), [5, 6]),
    "shard that begins on the grid of vectors": (3, 101, 81, (16, 48, 200), [5, 6]),
    "narrow shard of many groups": (2, 150, 100, (0, 64, 4096), [3]),
    "narrow shard of few groups": (16, 150, 100, (0, 64, 2048), [3]),
    "groups at every edge": (16, 340, 330, (200, 150, 500), [3]),
    "last columns of the parameter": (5, 64, 72, (64, 128, 200), [3]),
}


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-4, 5, shape).to(dtype)


def target_of(
    offsets: Tensor,
    place: tuple[int, int, int],
    out: Tensor,
    scale: Tensor | None = None,
    key: int = KEY,
) -> SketchTarget:
    return SketchTarget(offsets, *place, key, scale, out)


def assert_equal_to_eager(
    op: str,
    tensors: Sequence[Tensor | None],
    offsets: Tensor,
    place: tuple[int, int, int],
    buckets: int,
    key: int = KEY,
    scale: Tensor | None = None,
) -> Tensor:
    """Exactly, and on top of values that were there before; returns the sketch."""
    before = integers(len(offsets) - 1, buckets * 4096)
    expected = before.clone()
    result = before.clone()
    getattr(_eager, op)(*tensors, target_of(offsets, place, expected, scale, key))
    getattr(_triton, op)(*tensors, target_of(offsets, place, result, scale, key))
    assert torch.equal(result, expected)
    return result - before


def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The programs of each launch from now on, by kernel."""
    seen: list[tuple[Any, ...]] = []
    for name in ("linear_kernel", "rows_kernel", "ids_kernel", "add_kernel"):
        kernel = getattr(_triton, name)

        class Counted:
            def __init__(self, name: str, kernel: Any) -> None:
                self.name = name
                self.kernel = kernel

            def __getitem__(self, grid: Sequence[int]) -> Any:
                seen.append((self.name, *grid))
                return self.kernel[grid]

        monkeypatch.setattr(_triton, name, Counted(name, kernel))
    return seen
