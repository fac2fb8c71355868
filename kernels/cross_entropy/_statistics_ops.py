"""The custom ops of the statistics of tokens, and of their gradients.

The forward op also returns what the backward op needs, as that of the loss does (``_ops``).
"""

from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels._functorch import differentiable, entry_by_entry
from merit_fast.kernels.cross_entropy import _passes, _tiled
from merit_fast.kernels.cross_entropy._arguments import LogitForm
from merit_fast.kernels.cross_entropy._coefficients import (
    statistics_coefficients,
    token_statistics,
)
from merit_fast.kernels.cross_entropy._eager import check_labels
from merit_fast.kernels.cross_entropy._ops import TAGS, fake_gradients, gradients_of_head, head_of
from merit_fast.kernels.cross_entropy._vocabulary import check_shares, combine_states

OP = "linear_token_statistics"


@torch.library.custom_op("merit_fast::linear_token_statistics", mutates_args=(), tags=TAGS)
def token_statistics_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    scale: float,
    temperature: float,
    vocabulary: list[int],
    group: str,
    for_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of N tokens, and what the backward op needs.

    Returns:
        log_probs, entropy, is_top1 and log_sum_exp [N], then softmax [2, N] and the logits kept.
    """
    check_shares(OP, vocabulary, weight, labels, group)
    check_labels(OP, labels, vocabulary[1])
    form = LogitForm(softcap, scale, temperature)
    head = head_of((hidden, weight, bias, labels), form, vocabulary, backend)
    numel = _tiled.kept_numel(hidden, weight) if for_backward else 0
    kept = hidden.new_empty(numel, dtype=head.dtype)
    state = _passes.forward(head, kept, statistics=True)
    combine_states(state, group)
    softmax = hidden.new_zeros(2, len(labels), dtype=torch.float64)
    softmax[:, : len(head)] = state[:2]
    log_probs, entropy, is_top1, lse = (
        values.new_zeros(len(labels)).index_copy_(0, head.rows, values)
        for values in token_statistics(state)
    )
    return log_probs, entropy, is_top1, lse, softmax, kept


@token_statistics_op.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels, softcap, scale, temperature, vocabulary, group, for_backward,
    backend,
):  # fmt: skip
    tokens = hidden.shape[0]
    numel = _tiled.kept_numel(hidden, weight) if for_backward else 0
    return (
        hidden.new_empty(tokens, dtype=torch.float32),
        hidden.new_empty(tokens, dtype=torch.float32),
        hidden.new_empty(tokens, dtype=torch.bool),
        hidden.new_empty(tokens, dtype=torch.float32),
        hidden.new_empty(2, tokens, dtype=torch.float64),
        hidden.new_empty(numel, dtype=_tiled.work_dtype(weight)),
    )


@torch.library.custom_op("merit_fast::linear_token_statistics_backward", mutates_args=(), tags=TAGS)
def token_statistics_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    scale: float,
    temperature: float,
    vocabulary: list[int],
    group: str,
    backend: str,
    entropy: Tensor,
    softmax: Tensor,
    kept: Tensor,
    d_log_probs: Tensor | None,
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; unwanted ones are empty."""
    form = LogitForm(softcap, scale, temperature)
    head = head_of((hidden, weight, bias, labels), form, vocabulary, backend)
    of_rows = (
        None if values is None else values[head.rows] for values in (d_log_probs, d_entropy, d_lse)
    )
    coefficients = statistics_coefficients(softmax[:, : len(head)], entropy[head.rows], *of_rows)
    return gradients_of_head(head, hidden, kept, coefficients, wanted, group)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors_and_options, _, backend = inputs
    _, entropy, _, _, softmax, kept = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors_and_options[:4], entropy, softmax, kept)
    ctx.options = [*tensors_and_options[4:], backend]


def _gradients(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, entropy, softmax, kept = ctx.saved_tensors
    d_log_probs, d_entropy, _, d_lse, *_ = gradients
    wanted = [ctx.needs_input_grad[k] for k in range(3)]
    results = token_statistics_backward(
        *inputs, *ctx.options, entropy, softmax, kept, d_log_probs, d_entropy, d_lse, wanted
    )
    of_inputs = [result if want else None for want, result in zip(wanted, results, strict=True)]
    return *of_inputs, *[None] * (len(ctx.needs_input_grad) - 3)


token_statistics_backward.register_fake(fake_gradients)
entry_by_entry(token_statistics_op)
entry_by_entry(token_statistics_backward)
run_token_statistics = differentiable(token_statistics_op, _save, _gradients)
