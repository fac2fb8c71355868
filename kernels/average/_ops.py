"""The average of torch tensors: argument checks, and one custom op that chooses the backend."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels.average import _eager, _native
from merit_fast.kernels.average._dtypes import DTYPES

_CHUNK = 1 << 20  # elements that eager holds in float64 at a time, and that a native thread takes


def average_tensors(
    op: str,
    models: Sequence[Sequence[Tensor]],
    weights: Sequence[float],
    out: Sequence[Tensor] | None,
    backend: str | None,
) -> list[Tensor]:
    """Computes ``foreach_weighted_average``; errors begin with ``op``."""
    if not models or len(models) != len(weights):
        raise ValueError(
            f"{op}: needs as many tensors as weights, got {len(models)}, {len(weights)}"
        )
    first = models[0]
    for k, model in enumerate([*models, *([] if out is None else [out])]):
        role = f"input {k}" if k < len(models) else "out"
        if len(model) != len(first):
            raise ValueError(f"{op}: {role} must have {len(first)} tensors, got {len(model)}")
        for i, (tensor, expected) in enumerate(zip(model, first, strict=True)):
            _check(f"{op}: {role}, tensor {i}", tensor, expected.shape, first[0].device)
    if out is None:
        out = [
            torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in first
        ]
    if not first:
        return list(out)
    inputs = [tensor.detach().contiguous().view(-1) for model in models for tensor in model]
    # The kernels walk memory in order, so a strided result is written to a new tensor and copied.
    targets = [t.detach() if t.is_contiguous() else t.new_empty(t.shape) for t in out]
    _average(
        inputs,
        [float(weight) for weight in weights],
        [target.view(-1) for target in targets],
        backend,
    )
    for tensor, target in zip(out, targets, strict=True):
        if not tensor.is_contiguous():
            tensor.detach().copy_(target)
    return list(out)


def _check(name: str, tensor: Tensor, shape: torch.Size, device: torch.device) -> None:
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name}: dtype must be one of {names}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: shape must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: must be on {device}, is on {tensor.device}")


@torch.library.custom_op("merit_fast::weighted_average", mutates_args={"out"})
def _average(
    inputs: Sequence[Tensor], weights: Sequence[float], out: Sequence[Tensor], backend: str | None
) -> None:
    """Averages K N flat contiguous ``inputs``, model by model, into N tensors ``out``.

    The backend is chosen when the op runs.
    """
    count = len(out)
    _refuse_overlaps(inputs, out)
    columns = [([*inputs[i::count]], target) for i, target in enumerate(out) if target.numel()]
    chosen = dispatch.choose("weighted_average", out[0].device.type, backend)
    if not columns:
        return
    if chosen == "triton":
        from merit_fast.kernels.average import _triton

        _triton.average(columns, weights)
    elif chosen == "cpu":
        _average_native(columns, weights)
    else:
        for tensors, target in columns:
            _eager.average_tensors(tensors, weights, target, _CHUNK)


@_average.register_fake
def _(
    inputs: Sequence[Tensor], weights: Sequence[float], out: Sequence[Tensor], backend: str | None
) -> None:
    return None


def _average_native(
    columns: Sequence[tuple[list[Tensor], Tensor]], weights: Sequence[float]
) -> None:
    def run(job: tuple[list[Tensor], Tensor, int]) -> None:
        tensors, target, first = job
        _native.weighted_average(
            [tensor.data_ptr() + first * tensor.itemsize for tensor in tensors],
            [DTYPES.index(tensor.dtype) for tensor in tensors],
            list(weights),
            target.data_ptr() + first * target.itemsize,
            DTYPES.index(target.dtype),
            min(_CHUNK, len(target) - first),
        )

    jobs = [(*column, first) for column in columns for first in range(0, len(column[1]), _CHUNK)]
    threads = min(torch.get_num_threads(), sum(len(target) for _, target in columns) // _CHUNK)
    if threads < 2:
        for job in jobs:
            run(job)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, jobs))


def _refuse_overlaps(inputs: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Allows result i to be an input i, byte for byte; other overlaps are read after the write."""

    def span(tensor: Tensor) -> tuple[int, int]:
        return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize

    count = len(out)
    written = [(*span(target), i, True) for i, target in enumerate(out)]
    read = [
        (*span(tensor), k % count, False)
        for k, tensor in enumerate(inputs)
        if span(tensor) != span(out[k % count])
    ]
    written_until = 0
    read_until = 0
    for start, stop, index, is_written in sorted(
        span for span in written + read if span[0] < span[1]
    ):
        if start < written_until or (is_written and start < read_until):
            role = "out" if is_written else "an input"
            raise ValueError(
                f"weighted_average: {role} of tensor {index} overlaps memory of another tensor"
            )
        if is_written:
            written_until = max(written_until, stop)
        else:
            read_until = max(read_until, stop)
