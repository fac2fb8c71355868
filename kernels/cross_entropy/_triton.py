"""Launches the loss's Triton kernels, in functions named as those of ``_native``."""

import triton
from torch import Tensor

from merit_fast.kernels._devices import device_of
from merit_fast.kernels.cross_entropy._arguments import LogitForm
from merit_fast.kernels.cross_entropy._triton_kernels import gradient_kernel, update_kernel

UPDATE_BLOCK = 4096
GRADIENT_BLOCK = 1024


def update(
    logits: Tensor,
    first: int,
    bias: Tensor | None,
    form: LogitForm,
    labels: Tensor,
    state: Tensor,
) -> None:
    """Updates ``state`` as ``_native.update`` does."""
    rows, columns = logits.shape
    tensors = (logits, logits if bias is None else bias, labels, state)
    numbers = (state.stride(0), columns, first, *_factors(form))
    flags = (bias is not None, form.softcap is not None, len(state) == 6, UPDATE_BLOCK)
    with device_of(logits):
        update_kernel[(rows,)](*tensors, *numbers, *flags, num_warps=8)


def gradient(
    logits: Tensor,
    first: int,
    bias: Tensor | None,
    form: LogitForm,
    labels: Tensor,
    terms: Tensor,
    out: Tensor,
) -> None:
    """Fills ``out`` as ``_native.gradient`` does."""
    rows, columns = logits.shape
    programs = rows * triton.cdiv(columns, GRADIENT_BLOCK)
    tensors = (logits, logits if bias is None else bias, labels, terms, out)
    numbers = (terms.stride(0), columns, first, *_factors(form))
    flags = (bias is not None, form.softcap is not None, len(terms) == 5, GRADIENT_BLOCK)
    with device_of(logits):
        gradient_kernel[(programs,)](*tensors, *numbers, *flags, num_warps=4)


def _factors(form: LogitForm) -> tuple[float, float, float]:
    return form.scale, form.softcap or 1.0, 1.0 / form.temperature
