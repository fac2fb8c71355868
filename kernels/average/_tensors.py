"""The torch door of the average: arguments checked, one custom op, and the backends eager and cpu.

``_triton`` holds the third; it is imported when it runs.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels.average import _native

# The order is that of the codes in csrc/common/dtypes.h.
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_CHUNK = 1 << 20  # elements: what eager holds in float64 at a time, and what a native thread takes


def average(
    op: str,
    models: Sequence[Sequence[Tensor]],
    weights: Sequence[float],
    out: Sequence[Tensor] | None,
    backend: str | None,
) -> list[Tensor]:
    """``foreach_weighted_average``, with errors in the name of ``op``."""
    if not models or len(models) != len(weights):
        raise ValueError(
            f"{op}: needs as many tensors as weights, got {len(models)}, {len(weights)}"
        )
    first = models[0]
    for k, model in enumerate([*models, *([] if out is None else [out])]):
        what = f"input {k}" if k < len(models) else "out"
        if len(model) != len(first):
            raise ValueError(f"{op}: {what} must have {len(first)} tensors, got {len(model)}")
        for i, (tensor, expected) in enumerate(zip(model, first, strict=True)):
            _check(f"{op}: {what}, tensor {i}", tensor, expected.shape, first[0].device)
    if out is None:
        out = [
            torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in first
        ]
    if not first:
        return list(out)
    inputs = [tensor.detach().contiguous().view(-1) for model in models for tensor in model]
    # A strided result is written beside and copied: the kernels walk memory in order.
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


def _check(what: str, tensor: Tensor, shape: torch.Size, device: torch.device) -> None:
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{what}: dtype must be one of {names}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{what}: shape must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{what}: must be on {device}, is on {tensor.device}")


@torch.library.custom_op("merit_fast::weighted_average", mutates_args={"out"})
def _average(
    inputs: Sequence[Tensor], weights: Sequence[float], out: Sequence[Tensor], backend: str | None
) -> None:
    """``inputs``: K N flat contiguous tensors, model by model; ``out``: N. The backend is chosen here, when it runs."""
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
            average_eager(tensors, weights, target)


@_average.register_fake
def _(
    inputs: Sequence[Tensor], weights: Sequence[float], out: Sequence[Tensor], backend: str | None
) -> None:
    return None


def average_eager(tensors: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """The reference on flat tensors: float64 sums in order, one rounding."""
    for first in range(0, len(out), _CHUNK):
        parts = [tensor[first : first + _CHUNK].double() for tensor in tensors]
        total = weights[0] * parts[0]
        for weight, part in zip(weights[1:], parts[1:], strict=True):
            total += weight * part
        out[first : first + _CHUNK] = _rounded(total, out.dtype)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to nearest even in one step; torch rounds to float32 on its way to 16 bits, so that must be to odd."""
    if dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    single = values.float()
    back = single.double()
    inexact = (back != values) & ~values.isnan()
    toward_zero = single.view(torch.int32) - (back.abs() > values.abs()).int()
    odd = torch.where(inexact, toward_zero | 1, single.view(torch.int32)).view(torch.float32)
    return odd.to(dtype).masked_fill_(values.isnan(), float("nan"))


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
    """A result may be the input of its own place, to the byte; any other overlap would be read after it is written."""

    def span(tensor: Tensor) -> tuple[int, int]:
        return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize

    count = len(out)
    written = [(*span(target), i, True) for i, target in enumerate(out)]
    read = [
        (*span(tensor), k % count, False)
        for k, tensor in enumerate(inputs)
        if span(tensor) != span(out[k % count])
    ]
    written_to = read_to = 0  # how far the spans before reach
    for start, stop, place, is_written in sorted(
        span for span in written + read if span[0] < span[1]
    ):
        if start < written_to or (is_written and start < read_to):
            role = "out" if is_written else "an input"
            raise ValueError(
                f"weighted_average: {role} of tensor {place} overlaps memory that another one uses"
            )
        written_to, read_to = (
            (max(written_to, stop), read_to) if is_written else (written_to, max(read_to, stop))
        )
