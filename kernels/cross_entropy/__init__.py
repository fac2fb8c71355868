"""Linear + cross-entropy without the logits in memory, with sums per example and per dataset."""

from typing import NamedTuple

from torch import Tensor

from merit_fast.kernels.cross_entropy import _eager, _ops
from merit_fast.kernels.cross_entropy._arguments import (
    Batch,
    HeadSketch,
    LossTerms,
    VocabularyShard,
)
from merit_fast.kernels.cross_entropy._checks import (
    check_datasets,
    check_devices,
    check_head,
    check_sketch,
    check_terms,
    check_vocabulary,
    checked_offsets,
    chosen_backend,
    refuse_sketch,
    wants_gradients,
)
from merit_fast.kernels.cross_entropy._eager import OP
from merit_fast.kernels.cross_entropy._statistics import TokenStatistics, linear_token_statistics
from merit_fast.kernels.cross_entropy._vocabulary import op_arguments
from merit_fast.kernels.labels import IGNORED_LABEL
from merit_fast.kernels.sketch import CountSketch

__all__ = [
    "IGNORED_LABEL",
    "LinearCrossEntropy",
    "TokenStatistics",
    "VocabularyShard",
    "linear_cross_entropy",
    "linear_token_statistics",
]


class LinearCrossEntropy(NamedTuple):
    """Results of ``linear_cross_entropy``; all but the counts carry a gradient.

    Losses are float64 where hidden is.
    """

    loss: Tensor  # scalar float32
    # [B] float32: sums over each example's target tokens, without dataset weights
    example_loss: Tensor
    dataset_loss: Tensor  # [num_datasets] float32: the same per dataset; empty without dataset_ids
    dataset_tokens: Tensor  # [num_datasets] int64: target tokens; empty without dataset_ids


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    dataset_ids: Tensor | None = None,
    num_datasets: int | None = None,
    dataset_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: str = "mean",
    divisor: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sketch: CountSketch | None = None,
    sketch_name: str | None = None,
    sketch_out: Tensor | None = None,
    vocabulary: VocabularyShard | None = None,
    backend: str | None = None,
) -> LinearCrossEntropy:
    """Cross-entropy of a language model's head, without all logits in memory (Wijmans et al. 2024).

        logits = hidden.float() @ weight.float().T + bias               # [N, V]
        logits = softcap * tanh(logits / softcap)                       # with softcap (Gemma 2)
        token = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        token = token + z_loss * logits.logsumexp(-1) ** 2          # PaLM (Chowdhery et al. 2022)
        example_loss[b] = token[of b].sum();  dataset_loss[d] = token[of d].sum()
        loss = (dataset_weights[dataset of each token] * token).sum() / divisor

    Tiles of the vocabulary update a running log-sum-exp (Milakov & Gimelshein 2018); the backward
    pass computes the logits again. Sums are float64, in the order of the tokens.

    Args:
        hidden: [N, H] or [B, T, H], float32 or bfloat16; float64 by the eager backend.
        weight: [V, H], the dtype of hidden; may be tied to the embedding or frozen. Only tensors
            that require a gradient get one.
        labels: [N] or [B, T] int64, **already shifted**: each stands at the position that predicts
            it. Rows whose label is ``IGNORED_LABEL`` (-100) enter no matrix product.
        bias: [V], the dtype of hidden.
        dataset_ids: [B] int64, 0 <= id < num_datasets, of the examples.
        num_datasets: needed with dataset_ids.
        dataset_weights: [num_datasets] float32, constants; None: all 1.
        cu_seqlens: [B + 1] int64 or int32: examples lie end to end in the N tokens. None: each row
            of [B, T], or each token of [N], is an example.
        reduction: "mean" divides ``loss`` by the number of target tokens, "sum" by 1.
        divisor: instead of reduction, e.g. the target tokens of all micro-batches of a step.
        label_smoothing: in [0, 1]: this share of the target is spread evenly over the vocabulary.
        softcap: positive and finite; as above.
        z_loss: finite and not negative; as above.
        sketch: width and seed of a CountSketch of weight's gradient, taken per example in the
            backward pass without that gradient in memory; weight may be frozen.
        sketch_name: the parameter's name, which selects its hash: a tied head's is its embedding's.
        sketch_out: [B, D] float32, contiguous, added to.
        vocabulary: where weight and bias have only this process's rows of the head. Every process
            of the group passes the same hidden and labels and gets the same results; the gradient
            of hidden is the sum over the processes.
        backend: "eager", "cpu", "triton"; None chooses by device.

    Returns:
        See ``LinearCrossEntropy``. Without a target token the loss is 0, and so are the gradients.

    Raises:
        ValueError: shapes or dtypes disagree, a label or id is out of range, cu_seqlens do not end
            at N.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    check_head(hidden, weight, labels, bias, OP, vocabulary is not None)
    check_vocabulary(OP, weight, vocabulary)
    offsets = checked_offsets(labels, cu_seqlens)
    examples = offsets.shape[0] - 1
    check_datasets(examples, dataset_ids, num_datasets, dataset_weights)
    check_terms(reduction, label_smoothing, softcap, z_loss)
    check_sketch(examples, sketch, sketch_name, sketch_out)
    check_devices(OP, hidden, sketch_out=sketch_out)
    device = hidden.device
    batch = Batch(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        weight=weight,
        bias=bias,
        labels=labels.reshape(-1),
        offsets=offsets,
        dataset_ids=None if dataset_ids is None else dataset_ids.to(device),
        num_datasets=num_datasets or 0,
        dataset_weights=None if dataset_weights is None else dataset_weights.to(device).detach(),
    )
    terms = LossTerms(softcap, float(label_smoothing), float(z_loss))
    head_sketch = None
    if sketch is not None and sketch_name is not None and sketch_out is not None:
        refuse_sketch(vocabulary)
        head_sketch = HeadSketch(sketch, sketch_name, sketch_out)
    sharded = vocabulary is not None
    chosen = chosen_backend(OP, device.type, hidden.dtype, backend, sharded)
    if chosen == "eager":
        sums = _eager.linear_cross_entropy(batch, terms, head_sketch)
    else:
        sums = _run_op(batch, terms, head_sketch, vocabulary, chosen)
    total, example_loss, dataset_loss, dataset_tokens, tokens = sums
    if divisor is None:
        divisor = tokens.clamp(min=1) if reduction == "mean" else 1
    return LinearCrossEntropy(total / divisor, example_loss, dataset_loss, dataset_tokens)


def _run_op(
    batch: Batch,
    terms: LossTerms,
    sketch: HeadSketch | None,
    vocabulary: VocabularyShard | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    leaves = (batch.hidden, batch.weight, batch.bias)
    results: tuple[Tensor, ...] = _ops.run_linear_cross_entropy(
        *leaves,
        batch.labels,
        batch.offsets,
        batch.dataset_ids,
        batch.num_datasets,
        batch.dataset_weights,
        terms.softcap,
        terms.label_smoothing,
        terms.z_loss,
        [] if sketch is None else [sketch.sketch.proj_dim, sketch.sketch.seed],
        "" if sketch is None else sketch.name,
        None if sketch is None else sketch.out,
        *op_arguments(vocabulary, batch.weight),
        wants_gradients(*leaves),
        backend,
    )
    total, example, dataset, counts, tokens = results[:5]
    return total, example, dataset, counts, tokens
