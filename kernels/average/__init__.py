"""Weighted average of arrays or tensors of mixed float types. Imports no torch: the merge command runs on it alone.

Two doors: ``average_arrays`` takes NumPy arrays; ``weighted_average`` and ``foreach_weighted_average`` take torch
tensors, on any device, and import torch when they are called.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from merit_fast.kernels import dispatch
from merit_fast.kernels.average import _eager
from merit_fast.kernels.average.dtypes import FLOAT_DTYPES

if TYPE_CHECKING:
    from torch import Tensor


def weighted_average(
    tensors: "Sequence[Tensor]",
    weights: Sequence[float],
    out: "Tensor | None" = None,
    *,
    backend: str | None = None,
) -> "Tensor":
    """Average K tensors of one shape. Not differentiable.

        out = sum(w * x.double() for w, x in zip(weights, tensors)).to(out.dtype)

    On the CPU that is done in float64 and rounded once, by "eager" on every device too: the same bits as
    ``average_arrays``. On "triton" products and sums are float32, in the order given and without contraction, or
    float64 where a float64 tensor takes part; then they are rounded to the result.

    Args:
        tensors: K tensors of one shape on one device; bfloat16, float16, float32 or float64, mixed as you like.
            Strided ones are copied first.
        weights: K floats, used as they are (not normalised here).
        out: where to write; its dtype is the result's. May be one of ``tensors``. None: new, of the first one's dtype.
        backend: "eager" (PyTorch), "cpu" (native), "triton"; None chooses by device.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        ValueError: counts, shapes or devices disagree; ``out`` overlaps an input without being it.
        TypeError: a tensor is not of a float type listed.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    from merit_fast.kernels.average import _tensors

    outs = None if out is None else [out]
    return _tensors.average(
        "weighted_average", [[tensor] for tensor in tensors], weights, outs, backend
    )[0]


def foreach_weighted_average(
    models: "Sequence[Sequence[Tensor]]",
    weights: Sequence[float],
    out: "Sequence[Tensor] | None" = None,
    *,
    backend: str | None = None,
) -> "list[Tensor]":
    """``weighted_average`` of many tensors at once: on "triton" one launch for all of them.

        [weighted_average([model[i] for model in models], weights) for i in range(N)]

    Args:
        models: K sequences of N tensors, all on one device; the i-th of every model have one shape.
        weights: K floats.
        out: N tensors, none overlapping another; the i-th may be the i-th of a model. Tied tensors must come once.
        backend: as in ``weighted_average``.

    Returns:
        N tensors.

    Raises:
        as ``weighted_average``.
    """
    from merit_fast.kernels.average import _tensors

    return _tensors.average("foreach_weighted_average", models, weights, out, backend)


def average_arrays(
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
            f"average_arrays: needs as many inputs as weights and dtypes, "
            f"got {len(inputs)}, {len(weights)}, {len(dtypes)}"
        )
    n = inputs[0].size
    if out is None:
        out = np.empty(n, _storage(out_dtype))
    for array, dtype in zip([*inputs, out], [*dtypes, out_dtype], strict=True):
        _check(array, dtype, n)
    if dispatch.choose("average_arrays", "cpu", backend) == "eager":
        _eager.average_arrays(inputs, weights, dtypes, out, out_dtype)
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
    inputs: Sequence[npt.NDArray[Any]],
    base: npt.NDArray[Any],
    *,
    dtypes: Sequence[str],
    base_dtype: str,
) -> npt.NDArray[np.float64]:
    """The K x K Gram matrix of K arrays' differences from a base, in fp64.

        deltas = [x.astype(float64) - base.astype(float64) for x in inputs]; gram[i, j] = deltas[i] @ deltas[j]

    Eight running sums (element index modulo 8) joined in a fixed tree, so the native engine that merges files gives the
    same bits; this function is its NumPy reference.

    Args:
        inputs: K one-dimensional arrays of n elements; bf16 as its uint16 bits.
        base: [n].
        dtypes, base_dtype: the element types, named as in ``average_arrays``.

    Returns:
        [K, K] float64, symmetric.
    """
    for array, dtype in zip([*inputs, base], [*dtypes, base_dtype], strict=True):
        _check(array, dtype, base.size)
    return _eager.delta_gram(inputs, base, dtypes, base_dtype)


def _storage(dtype: str) -> npt.DTypeLike:
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"average_arrays: dtype must be one of {', '.join(FLOAT_DTYPES)}, got {dtype}"
        )
    return FLOAT_DTYPES[dtype][1]


def _check(array: npt.NDArray[Any], dtype: str, n: int) -> None:
    if array.dtype != _storage(dtype):
        raise TypeError(
            f"average_arrays: a {dtype} array must be stored as {_storage(dtype)}, got {array.dtype}"
        )
    if array.ndim != 1 or not array.flags.c_contiguous or array.size != n:
        raise ValueError(
            f"average_arrays: arrays must be contiguous and [{n}], got {list(array.shape)}"
        )
