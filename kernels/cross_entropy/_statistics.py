"""Log-probabilities, entropy and top-1 of tokens, without the logits in memory."""

from typing import NamedTuple

from torch import Tensor

from merit_fast.kernels.cross_entropy import _eager
from merit_fast.kernels.cross_entropy._arguments import LogitForm, VocabularyShard
from merit_fast.kernels.cross_entropy._checks import (
    check_form,
    check_head,
    check_vocabulary,
    chosen_backend,
    wants_gradients,
)
from merit_fast.kernels.cross_entropy._statistics_ops import OP, run_token_statistics
from merit_fast.kernels.cross_entropy._vocabulary import op_arguments


class TokenStatistics(NamedTuple):
    """Results of ``linear_token_statistics``, 0 or False where the label is ignored.

    Their shape is that of labels; numbers are float32, or float64 where hidden is.
    """

    log_probs: Tensor  # of the labels
    entropy: Tensor | None  # in nats
    is_top1: Tensor | None  # bool: the label is the first of the largest logits
    log_sum_exp: Tensor


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = False,
    top1: bool = False,
    vocabulary: VocabularyShard | None = None,
    backend: str | None = None,
) -> TokenStatistics:
    """Statistics of the tokens that a head predicts, without all logits (Wijmans et al. 2024).

        logits = scale * (hidden.float() @ weight.float().T + bias)     # [N, V]
        logits = softcap * tanh(logits / softcap)                       # with softcap (Gemma 2)
        logits = logits / temperature
        log_probs = logits.log_softmax(-1)[labels of the rows]
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        is_top1 = logits.argmax(-1) == labels
        log_sum_exp = logits.logsumexp(-1)

    Log-probabilities, entropy and log-sum-exp have gradients in hidden, weight and bias. Tiles of
    the vocabulary update running sums (Milakov & Gimelshein 2018); the backward pass computes the
    logits again.

    Args:
        hidden: [N, H] or [B, T, H], float32 or bfloat16; float64 by the eager backend.
        weight: [V, H], the dtype of hidden.
        labels: [N] or [B, T] int64, already shifted. Rows whose label is ``IGNORED_LABEL`` (-100)
            enter no matrix product.
        bias: [V], the dtype of hidden.
        softcap: positive and finite; as above.
        scale: any finite number; 0 makes all words equally likely.
        temperature: positive.
        entropy: whether to return the entropy.
        top1: whether to return ``is_top1``; of equal logits the first one is the largest.
        vocabulary: where weight has only a process's rows of the head, as in
            ``linear_cross_entropy``.
        backend: "eager", "cpu", "triton"; None chooses by device.

    Returns:
        See ``TokenStatistics``.

    Raises:
        ValueError: shapes or dtypes disagree, a label or number is out of range.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    check_head(hidden, weight, labels, bias, OP, vocabulary is not None)
    check_form(OP, softcap, scale, temperature)
    check_vocabulary(OP, weight, vocabulary)
    form = LogitForm(softcap, float(scale), float(temperature))
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat = labels.reshape(-1)
    sharded = vocabulary is not None
    chosen = chosen_backend(OP, hidden.device.type, hidden.dtype, backend, sharded)
    if chosen == "eager":
        results = _eager.linear_token_statistics(rows, weight, bias, flat, form)
    else:
        results = run_token_statistics(
            rows, weight, bias, flat, softcap, form.scale, form.temperature,
            *op_arguments(vocabulary, weight), wants_gradients(rows, weight, bias), chosen,
        )[:4]  # fmt: skip
    log_probs, entropies, is_top1, lse = (values.view(labels.shape) for values in results)
    return TokenStatistics(
        log_probs, entropies if entropy else None, is_top1 if top1 else None, lse
    )
