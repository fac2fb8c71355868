"""The loss's calls of merit_fast._C (csrc/cross_entropy/): the steps between the products."""

from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels.cross_entropy._arguments import LogitForm


def update(
    logits: Tensor,
    first: int,
    bias: Tensor | None,
    form: LogitForm,
    labels: Tensor,
    state: Tensor,
) -> None:
    """Update the state of each row, float64 [4, M] or [6, M].

    Maximum, sum of exponentials, label's logit, sum of logits; then sum of (logit - maximum) *
    exponential, and maximum over the words before the label.
    """
    native = dispatch.native()
    native.loss_update(
        tile=_tile(native, logits, first, bias, form, labels),
        state=state.data_ptr(),
        stride=state.stride(0),
        statistics=len(state) == 6,
    )


def gradient(
    logits: Tensor,
    first: int,
    bias: Tensor | None,
    form: LogitForm,
    labels: Tensor,
    terms: Tensor,
    out: Tensor,
) -> None:
    """Write the gradient of the logits to ``out``, which may be the logits.

    terms [4, M] or [5, M] float32: shift, factor, target, uniform; then linear.
    """
    native = dispatch.native()
    native.loss_gradient(
        tile=_tile(native, logits, first, bias, form, labels),
        terms=terms.data_ptr(),
        linear=len(terms) == 5,
        stride=terms.stride(0),
        out=out.data_ptr(),
    )


def _tile(
    native: Any,
    logits: Tensor,
    first: int,
    bias: Tensor | None,
    form: LogitForm,
    labels: Tensor,
) -> Any:
    rows, columns = logits.shape
    return native.LogitsTile(
        logits=logits.data_ptr(),
        bf16=logits.dtype == torch.bfloat16,
        rows=rows,
        columns=columns,
        first=first,
        bias=0 if bias is None else bias.data_ptr(),
        scale=form.scale,
        softcap=form.softcap or 0.0,
        sharpness=1.0 / form.temperature,
        labels=labels.data_ptr(),
        threads=torch.get_num_threads(),
    )
