"""Weighted average of arrays or tensors of mixed float types.

``average_arrays`` takes NumPy arrays and imports no torch, which the merge command relies on.
``weighted_average`` and ``foreach_weighted_average`` take torch tensors on any device and import
torch when they are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from merit_fast.kernels.average.dtypes import FLOAT_DTYPES
from merit_fast.kernels.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor


def weighted_average(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    out: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Average K tensors of one shape. Not differentiable.

        out = sum(w * x.double() for w, x in zip(weights, tensors)).to(out.dtype)

    "cpu" and, on every device, "eager" compute in float64 and round once: the bits of
    ``average_arrays``. "triton" computes products and sums in float32, or in float64 if a tensor is
    float64, in the order of the tensors and without contraction; then it rounds to the result.

    Args:
        tensors: K tensors of one shape on one device; bfloat16, float16, float32 or float64, in any
            mix. Strided ones are copied first.
        weights: K floats, used as they are (not normalised here).
        out: tensor to write, of the dtype wanted. May be one of ``tensors``. None: a new tensor of
            the first one's dtype.
        backend: "eager" (PyTorch), "cpu" (native), "triton"; None chooses by device.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        ValueError: counts, shapes or devices disagree; ``out`` overlaps an input and is not that
            input.
        TypeError: a tensor is not of a float type listed.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    from merit_fast.kernels.average import _ops

    outs = None if out is None else [out]
    models = [[tensor] for tensor in tensors]
    return _ops.average_tensors("weighted_average", models, weights, outs, backend)[0]


def foreach_weighted_average(
    models: Sequence[Sequence[Tensor]],
    weights: Sequence[float],
    out: Sequence[Tensor] | None = None,
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """Average many tensors at once, on "triton" in one launch. Not differentiable.

        [weighted_average([model[i] for model in models], weights) for i in range(N)]

    Args:
        models: K sequences of N tensors, all on one device; the i-th of every model have one shape.
        weights: K floats.
        out: N tensors that do not overlap; the i-th may be the i-th of a model. Give
            tied tensors once. None: new tensors of the first model's dtypes.
        backend: as in ``weighted_average``.

    Returns:
        N tensors.

    Raises:
        ValueError: as for ``weighted_average``.
        TypeError: as for ``weighted_average``.
    """
    from merit_fast.kernels.average import _ops

    return _ops.average_tensors("foreach_weighted_average", models, weights, out, backend)


def average_arrays(
    inputs: Sequence[npt.NDArray[Any]],
    weights: Sequence[float],
    *,
    dtypes: Sequence[str],
    out_dtype: str,
    out: npt.NDArray[Any] | None = None,
    backend: str | None = None,
) -> npt.NDArray[Any]:
    """Average K arrays with float64 sums in the order of the inputs, rounded once (ties to even).

        total = weights[0] * inputs[0].astype(float64)
        total += weights[k] * inputs[k].astype(float64)     # k = 1, ..., K - 1
        out = total.astype(out_dtype)                       # denormals are kept

    Args:
        inputs: K one-dimensional contiguous arrays of n elements; bf16 as its uint16 bits.
        weights: K floats, used as they are (not normalised here).
        dtypes: the K element types, named as in safetensors: "BF16", "F16", "F32", "F64".
        out_dtype: element type of the result, named likewise.
        out: array to write, contiguous [n]. May be one of the inputs. None: a new array.
        backend: "eager" (NumPy), "cpu" (native); None chooses.

    Returns:
        [n] of ``out_dtype`` (bf16 as uint16 bits). The same bits on every backend.

    Raises:
        ValueError: counts, lengths or layouts disagree.
        TypeError: an array is not of its stated type.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    from merit_fast.kernels import dispatch
    from merit_fast.kernels.average import _eager, _native

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
    _native.weighted_average(
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
    """The K x K Gram matrix of K arrays' differences from a base, in float64.

        deltas = [x.astype(float64) - base.astype(float64) for x in inputs]
        gram[i, j] = deltas[i] @ deltas[j]

    A product is eight running sums (by element index modulo 8), joined in a fixed tree. The native
    engine that merges files sums in the same order and gives the same bits; this is its NumPy
    reference.

    Args:
        inputs: K one-dimensional arrays of n elements; bf16 as its uint16 bits.
        base: [n].
        dtypes: element types of the branches, named as in ``average_arrays``.
        base_dtype: element type of the base.

    Returns:
        [K, K] float64, symmetric.

    Raises:
        ValueError: lengths or layouts disagree.
        TypeError: an array is not of its stated type.
    """
    from merit_fast.kernels.average import _eager

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
            f"average_arrays: a {dtype} array must be stored as {_storage(dtype)}, "
            f"got {array.dtype}"
        )
    if array.ndim != 1 or not array.flags.c_contiguous or array.size != n:
        raise ValueError(
            f"average_arrays: arrays must be contiguous and [{n}], got {list(array.shape)}"
        )
