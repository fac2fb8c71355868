"""The loss's calls of merit_fast._C (csrc/cross_entropy/): the steps between the products."""

from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels import dispatch


def update(
    logits: Tensor,
    first: int,
    bias: Tensor | None,
    softcap: float | None,
    labels: Tensor,
    state: Tensor,
) -> None:
    """Update state [4, M] float64: maximum, sum of exponentials, label's logit, sum of logits."""
    native = dispatch.native()
    native.loss_update(
        tile=_tile(native, logits, first, bias, softcap, labels),
        state=state.data_ptr(),
        stride=state.stride(0),
    )


def gradient(
    logits: Tensor,
    first: int,
    bias: Tensor | None,
    softcap: float | None,
    labels: Tensor,
    terms: Tensor,
    out: Tensor,
) -> None:
    """Write the gradient of the logits to ``out``, which may be the logits.

    terms [4, M] float32: shift, factor, target, uniform.
    """
    native = dispatch.native()
    native.loss_gradient(
        tile=_tile(native, logits, first, bias, softcap, labels),
        terms=terms.data_ptr(),
        stride=terms.stride(0),
        out=out.data_ptr(),
    )


def _tile(
    native: Any,
    logits: Tensor,
    first: int,
    bias: Tensor | None,
    softcap: float | None,
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
        softcap=softcap or 0.0,
        labels=labels.data_ptr(),
        threads=torch.get_num_threads(),
    )
