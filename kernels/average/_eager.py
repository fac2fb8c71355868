"""The references: float64 sums in order, rounded once.

For arrays in NumPy; for tensors in torch, which is imported when the function is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from merit_fast.kernels.average.dtypes import FLOAT_DTYPES
from merit_fast.kernels.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import Tensor


def average_arrays(
    inputs: Sequence[npt.NDArray[Any]],
    weights: Sequence[float],
    dtypes: Sequence[str],
    out: npt.NDArray[Any],
    out_dtype: str,
) -> None:
    # Infinities and NaN propagate, as in any cast.
    with np.errstate(over="ignore", invalid="ignore"):
        total = weights[0] * to_float64(inputs[0], dtypes[0])
        for array, weight, dtype in zip(inputs[1:], weights[1:], dtypes[1:], strict=True):
            total += weight * to_float64(array, dtype)
        total[np.isnan(total)] = np.nan  # the same NaN for any payloads of the inputs
        out[:] = float64_to_bf16(total) if out_dtype == "BF16" else total.astype(out.dtype)


def delta_gram(
    inputs: Sequence[npt.NDArray[Any]],
    base: npt.NDArray[Any],
    dtypes: Sequence[str],
    base_dtype: str,
) -> npt.NDArray[np.float64]:
    start = to_float64(base, base_dtype)
    padding = -base.size % 8
    deltas = [
        np.pad(to_float64(x, dtype) - start, (0, padding))
        for x, dtype in zip(inputs, dtypes, strict=True)
    ]
    gram = np.empty((len(deltas), len(deltas)))
    for i, a in enumerate(deltas):
        for j, b in enumerate(deltas[i:], i):
            lanes = (a * b).reshape(-1, 8)
            total = np.add.accumulate(lanes, axis=0)[-1] if len(lanes) else np.zeros(8)
            pairs = total[0::2] + total[1::2]
            gram[i, j] = gram[j, i] = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3])
    return gram


def to_float64(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float64]:
    """Converts exactly; bf16 comes as uint16 bits."""
    if dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def float64_to_bf16(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Rounds to nearest even in one step.

    The float32 in between is rounded to odd: rounded to nearest, it would be rounded twice.
    """
    with np.errstate(over="ignore", under="ignore"):
        single = values.astype(np.float32)
    bits = single.view(np.uint32)
    back = single.astype(np.float64)
    inexact = (back != values) & ~np.isnan(values)
    toward_zero = bits - (np.abs(back) > np.abs(values)).astype(np.uint32)
    bits = np.where(inexact, toward_zero | np.uint32(1), bits).astype(np.uint32)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(nan, 0x7FC0, rounded).astype(np.uint16)


def rounded(total: npt.NDArray[np.float64], out_dtype: str) -> tuple[npt.NDArray[Any], bool]:
    """Rounds once to ``out_dtype`` (bf16 as uint16 bits), and tells whether all is finite.

    Any NaN of ``total`` becomes the same NaN, in place.
    """
    total[np.isnan(total)] = np.nan
    if out_dtype == "BF16":
        out = float64_to_bf16(total)
        return out, bool(np.all((out & 0x7F80) != 0x7F80))
    narrow = total.astype(FLOAT_DTYPES[out_dtype][1])
    return narrow, bool(np.isfinite(narrow).all())


def average_tensors(
    tensors: Sequence[Tensor], weights: Sequence[float], out: Tensor, chunk: int
) -> None:
    """Averages flat tensors, ``chunk`` elements at a time."""
    for first in range(0, len(out), chunk):
        slices = [tensor[first : first + chunk].double() for tensor in tensors]
        total = weights[0] * slices[0]
        for weight, values in zip(weights[1:], slices[1:], strict=True):
            total += weight * values
        out[first : first + chunk] = _rounded(total, out.dtype)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float64 to nearest even in one step.

    torch converts to 16 bits by way of float32, so that float32 must be rounded to odd.
    """
    import torch

    if dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    single = values.float()
    back = single.double()
    inexact = (back != values) & ~values.isnan()
    toward_zero = single.view(torch.int32) - (back.abs() > values.abs()).int()
    odd = torch.where(inexact, toward_zero | 1, single.view(torch.int32)).view(torch.float32)
    return odd.to(dtype).masked_fill_(values.isnan(), float("nan"))
