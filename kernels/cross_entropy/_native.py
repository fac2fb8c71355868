"""The loss's calls of merit_fast._C (csrc/cross_entropy/): the steps between the products."""

from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels._devices import address
from merit_fast.kernels.cross_entropy._arguments import LogitForm
from merit_fast.kernels.cross_entropy._tiled import TiledHead, work_dtype

ROW_STEP = 16  # rows in a vector: divides the padded rows and the width
WORD_STEP = 64  # words that a thread takes at a time


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
        bias=address(bias),
        scale=form.scale,
        softcap=form.softcap or 0.0,
        sharpness=1.0 / form.temperature,
        labels=labels.data_ptr(),
        threads=torch.get_num_threads(),
    )


def has_head_passes(weight: Tensor) -> bool:
    """Whether ``head_forward`` and ``head_backward`` run here for a head of this width and dtype.

    Where oneDNN has AMX its products are faster than pairs of bf16 in vectors.
    """
    return (
        weight.dtype == work_dtype(weight) == torch.bfloat16
        and weight.shape[1] % ROW_STEP == 0
        and weight.is_contiguous()
        and dispatch.native().has_head_passes
        and not torch.cpu._is_amx_tile_supported()
    )


def head_forward(head: TiledHead, kept: Tensor, state: Tensor) -> None:
    """Adds all words of a head to the state of its rows, as ``update`` does tile by tile."""
    native = dispatch.native()
    description, _tensors = _head_pass(native, head, kept)
    native.head_forward(
        head=description,
        state=state.data_ptr(),
        stride=state.stride(0),
        statistics=len(state) == 6,
    )


def head_backward(
    head: TiledHead,
    kept: Tensor,
    terms: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Gradients of a head's padded rows [R, H] float32, weight and bias, of terms as above."""
    native = dispatch.native()
    description, tensors = _head_pass(native, head, kept)
    rows = tensors[0]
    padded = terms.new_zeros(5, len(rows))
    padded[0] = torch.inf  # a row of padding has exponentials of 0
    padded[: len(terms), : len(head)] = terms
    token_pairs = rows.view(-1, 2, rows.shape[1]).transpose(1, 2).contiguous()
    native.head_backward(
        head=description,
        token_pairs=token_pairs.data_ptr(),
        terms=padded.data_ptr(),
        d_hidden=address(d_hidden),
        d_weight=address(d_weight),
        d_bias=address(d_bias),
    )


def padded_rows(rows: int) -> int:
    return -(-rows // ROW_STEP) * ROW_STEP


def _head_pass(native: Any, head: TiledHead, kept: Tensor) -> tuple[Any, list[Tensor]]:
    """The native description, and the tensors that must outlive it: first the padded rows."""
    count = padded_rows(len(head))
    width = head.weight.shape[1]
    rows = head.hidden.new_zeros(count, width)
    rows[: len(head)] = head.hidden
    pairs = rows.view(count, -1, 2).transpose(0, 1).contiguous()
    words = len(head.weight)
    fitting = len(kept) // max(count, 1)
    description = native.HeadPass(
        hidden=pairs.data_ptr(),
        weight=head.weight.data_ptr(),
        rows=count,
        tokens=len(head),
        width=width,
        words=words,
        first=head.first_row,
        bias=address(head.bias),
        scale=head.form.scale,
        softcap=head.form.softcap or 0.0,
        sharpness=1.0 / head.form.temperature,
        labels=head.labels.data_ptr(),
        kept=kept.data_ptr(),
        kept_words=words if fitting >= words else fitting // WORD_STEP * WORD_STEP,
        threads=torch.get_num_threads(),
    )
    return description, [rows, pairs]
