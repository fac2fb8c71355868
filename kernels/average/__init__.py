"""Weighted average of arrays of mixed float types. Imports no torch: the merge command runs on this family alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from merit_fast.kernels import dispatch
from merit_fast.kernels.average import _eager

# safetensors' names -> (code in csrc/levels.h, numpy type of the stored bits)
FLOAT_DTYPES: dict[str, tuple[int, npt.DTypeLike]] = {
    "BF16": (0, np.uint16),
    "F16": (1, np.float16),
    "F32": (2, np.float32),
    "F64": (3, np.float64),
}


def weighted_average(
    inputs: Sequence[npt.NDArray[Any]],
    weights: Sequence[float],
    *,
    dtypes: Sequence[str],
    out_dtype: str,
    out: npt.NDArray[Any] | None = None,
    backend: str | None = None,
) -> npt.NDArray[Any]:
    """Average K arrays with fp64 accumulation in the order given, rounded once (ties to even, denormals kept).

        acc = weights[0] * inputs[0].astype(float64); acc += weights[k] * inputs[k].astype(float64), k = 1..K-1
        out = acc.astype(out_dtype)

    Args:
        inputs: K one-dimensional contiguous arrays of n elements; bf16 as its uint16 bits.
        weights: K floats, used as they are (not normalised here).
        dtypes: the K element types, named as in safetensors: "BF16", "F16", "F32", "F64".
        out_dtype: the same for the result.
        out: where to write, contiguous [n]; None allocates. May be one of the inputs.
        backend: "eager" (NumPy), "cpu" (native); None chooses.

    Returns:
        [n] of ``out_dtype`` (bf16 as uint16 bits). The same bits on every backend.

    Raises:
        ValueError: counts, lengths or layouts disagree.   TypeError: an array is not of its stated type.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    if not inputs or not len(inputs) == len(weights) == len(dtypes):
        raise ValueError(
            f"weighted_average: needs as many inputs as weights and dtypes, "
            f"got {len(inputs)}, {len(weights)}, {len(dtypes)}"
        )
    n = inputs[0].size
    if out is None:
        out = np.empty(n, _storage(out_dtype))
    for array, dtype in zip([*inputs, out], [*dtypes, out_dtype], strict=True):
        _check(array, dtype, n)
    if dispatch.choose("weighted_average", "cpu", backend) == "eager":
        _eager.weighted_average(inputs, weights, dtypes, out, out_dtype)
        return out
    native = dispatch.native_module()
    assert native is not None
    native.weighted_average(
        [array.ctypes.data for array in inputs],
        [FLOAT_DTYPES[dtype][0] for dtype in dtypes],
        [float(weight) for weight in weights],
        out.ctypes.data,
        FLOAT_DTYPES[out_dtype][0],
        n,
    )
    return out


def delta_gram(
    inputs: Sequence[npt.NDArray[Any]], base: npt.NDArray[Any], *, dtypes: Sequence[str], base_dtype: str
) -> npt.NDArray[np.float64]:
    """The K x K Gram matrix of K arrays' differences from a base, in fp64.

        deltas = [x.astype(float64) - base.astype(float64) for x in inputs]; gram[i, j] = deltas[i] @ deltas[j]

    Eight running sums (element index modulo 8) joined in a fixed tree, so the native engine that merges files gives the
    same bits; this function is its NumPy reference.

    Args:
        inputs: K one-dimensional arrays of n elements; bf16 as its uint16 bits.
        base: [n].
        dtypes, base_dtype: the element types, named as in ``weighted_average``.

    Returns:
        [K, K] float64, symmetric.
    """
    for array, dtype in zip([*inputs, base], [*dtypes, base_dtype], strict=True):
        _check(array, dtype, base.size)
    return _eager.delta_gram(inputs, base, dtypes, base_dtype)


def _storage(dtype: str) -> npt.DTypeLike:
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"weighted_average: dtype must be one of {', '.join(FLOAT_DTYPES)}, got {dtype}")
    return FLOAT_DTYPES[dtype][1]


def _check(array: npt.NDArray[Any], dtype: str, n: int) -> None:
    if array.dtype != _storage(dtype):
        raise TypeError(f"weighted_average: a {dtype} array must be stored as {_storage(dtype)}, got {array.dtype}")
    if array.ndim != 1 or not array.flags.c_contiguous or array.size != n:
        raise ValueError(f"weighted_average: arrays must be contiguous and [{n}], got {list(array.shape)}")
