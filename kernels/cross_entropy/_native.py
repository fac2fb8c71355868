"""What lies between the products, by merit_fast._C: csrc/cross_entropy/cross_entropy.inl."""

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
    """Carries state [4, M] float64 on: maximum, sum of exponentials, the label's logit, sum of logits."""
    native = dispatch.native_module()
    assert native is not None
    native.loss_update(
        _tile(logits, first, bias, softcap, labels), (state.data_ptr(), state.stride(0))
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
    """out = the logits' gradient; terms [4, M] float32: shift, factor, target, uniform. ``out`` may be the logits."""
    native = dispatch.native_module()
    assert native is not None
    tile = _tile(logits, first, bias, softcap, labels)
    native.loss_gradient(tile, (terms.data_ptr(), terms.stride(0)), out.data_ptr())


def _tile(
    logits: Tensor, first: int, bias: Tensor | None, softcap: float | None, labels: Tensor
) -> tuple[int, bool, int, int, int, int, float, int, int]:
    is_bf16, of_bias = logits.dtype == torch.bfloat16, 0 if bias is None else bias.data_ptr()
    threads = torch.get_num_threads()
    return (
        logits.data_ptr(),
        is_bf16,
        *logits.shape,
        first,
        of_bias,
        softcap or 0.0,
        labels.data_ptr(),
        threads,
    )
