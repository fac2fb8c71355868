"""Linear + cross-entropy without the logits in memory, with sums per example and per dataset."""

from typing import NamedTuple

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels.cross_entropy import _eager, _ops
from merit_fast.kernels.cross_entropy._eager import OP
from merit_fast.kernels.sketch import CountSketch

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]


class LinearCrossEntropy(NamedTuple):
    """What ``linear_cross_entropy`` returns; all but the counts carry a gradient."""

    loss: Tensor  # scalar float32
    example_loss: (
        Tensor  # [B] float32: sums over each example's target tokens, without dataset weights
    )
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
    backend: str | None = None,
) -> LinearCrossEntropy:
    """The cross-entropy of a language model's head, whose logits are never held as a whole.

        logits = hidden.float() @ weight.float().T + bias                    # [N, V]
        logits = softcap * tanh(logits / softcap)                            # with softcap (Gemma 2)
        token = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        token = token + z_loss * logits.logsumexp(-1) ** 2                   # PaLM (Chowdhery et al. 2022)
        example_loss[b] = token[of b].sum();  dataset_loss[d] = token[of d].sum()
        loss = (dataset_weights[dataset of each token] * token).sum() / divisor

    The vocabulary is taken in tiles, with the log-sum-exp carried on (Milakov & Gimelshein 2018); the backward pass
    computes the logits again (as Wijmans et al. 2024, "Cut Your Losses"). Sums are float64, in the order of the tokens.

    Args:
        hidden: [N, H] or [B, T, H], float32 or bfloat16; float64 by the eager backend.
        weight: [V, H], the dtype of hidden. Tied to the embedding or frozen: only what needs a gradient gets one.
        labels: [N] or [B, T] int64, **already shifted**: the label of the position it is predicted at; -100 is ignored,
            and such rows enter no matrix product.
        bias: [V], the dtype of hidden.
        dataset_ids: [B] int64, 0 <= id < num_datasets, of the examples.
        num_datasets: needed with dataset_ids.
        dataset_weights: [num_datasets] float32, constants; None: all 1.
        cu_seqlens: [B + 1]: examples lie end to end in the N tokens. None: an example is a row of [B, T], or each
            token of [N].
        reduction: "mean" divides ``loss`` by the number of target tokens, "sum" by 1.
        divisor: instead of reduction, e.g. the target tokens of all micro-batches of a step.
        label_smoothing: in [0, 1]: this share of the target is spread evenly over the vocabulary.
        softcap, z_loss: positive; as above.
        sketch: which CountSketch of weight's gradient is taken in the backward pass, per example, without that gradient
            in memory: weight may be frozen.
        sketch_name: the parameter's name, which selects its hash: a tied head's is its embedding's.
        sketch_out: [B, D] float32, contiguous, added to.
        backend: "eager", "cpu", "triton"; None chooses by device.

    Returns:
        See ``LinearCrossEntropy``. Without a target token the loss is 0, and so are the gradients.

    Raises:
        ValueError: shapes, dtypes, a label or an id out of range, cu_seqlens that do not end at N.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    _check_head(hidden, weight, labels, bias)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    offsets = _offsets(labels, cu_seqlens)
    examples = offsets.shape[0] - 1
    _check_datasets(examples, dataset_ids, num_datasets, dataset_weights)
    _check_terms(reduction, label_smoothing, softcap, z_loss)
    _check_sketch(examples, sketch, sketch_name, sketch_out)
    if dataset_ids is not None:
        dataset_ids = dataset_ids.to(flat.device)
    if dataset_weights is not None:
        dataset_weights = dataset_weights.to(flat.device).detach()
    batch = (flat, weight, bias, targets, offsets, dataset_ids, num_datasets or 0, dataset_weights)
    terms = (softcap, float(label_smoothing), float(z_loss))
    if _chosen(flat.device.type, flat.dtype, backend) == "eager":
        sums = _eager.linear_cross_entropy(*batch, *terms, sketch, sketch_name or "", sketch_out)
    else:
        width = [] if sketch is None else [sketch.proj_dim, sketch.seed]
        learns = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (hidden, weight, bias)
        )
        of_op = _ops.linear_cross_entropy(
            *batch, *terms, width, sketch_name or "", sketch_out, learns, backend
        )
        sums = of_op[:5]
    total, example_loss, dataset_loss, dataset_tokens, tokens = sums
    if divisor is None:
        divisor = tokens.clamp(min=1) if reduction == "mean" else 1
    return LinearCrossEntropy(total / divisor, example_loss, dataset_loss, dataset_tokens)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _chosen(device_type: str, dtype: torch.dtype, backend: str | None) -> str:
    if dtype == torch.float64 and backend in (None, "eager"):
        return "eager"
    chosen = dispatch.choose(OP, device_type, backend)
    if dtype == torch.float64:
        raise ValueError(
            f"{OP}: float64 is computed by the eager backend alone, got backend {backend!r}"
        )
    return chosen


def _offsets(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B + 1] int64: the tokens of example b are offsets[b]..offsets[b + 1] - 1."""
    if cu_seqlens is None:
        tokens = 1 if labels.dim() == 1 else labels.shape[1]
        return torch.arange(labels.shape[0] + 1, device=labels.device) * tokens
    if (
        cu_seqlens.dim() != 1
        or len(cu_seqlens) < 2
        or cu_seqlens.dtype not in (torch.int64, torch.int32)
    ):
        raise ValueError(
            f"{OP}: cu_seqlens must be int64 [B + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    return cu_seqlens.to(labels.device, torch.int64).contiguous()


def _check_head(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() not in (2, 3) or hidden.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float64,
    ):
        raise ValueError(
            f"{OP}: hidden must be [N, H] or [B, T, H] of float32 or bfloat16, got {hidden.dtype} {list(hidden.shape)}"
        )
    if (
        weight.dim() != 2
        or weight.shape[1] != hidden.shape[-1]
        or not weight.shape[0]
        or weight.dtype != hidden.dtype
    ):
        raise ValueError(
            f"{OP}: weight must be {hidden.dtype} [V, {hidden.shape[-1]}] as hidden is, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{OP}: labels must be int64 {list(hidden.shape[:-1])}, got {labels.dtype} {list(labels.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"{OP}: bias must be {weight.dtype} [{len(weight)}], got {bias.dtype} {list(bias.shape)}"
        )


def _check_datasets(
    examples: int, ids: Tensor | None, num_datasets: int | None, weights: Tensor | None
) -> None:
    if ids is None:
        if weights is not None or num_datasets is not None:
            raise ValueError(f"{OP}: num_datasets and dataset_weights need dataset_ids, got None")
        return
    if ids.dtype != torch.int64 or ids.dim() != 1 or ids.shape[0] != examples:
        raise ValueError(
            f"{OP}: dataset_ids must be int64 [{examples}], got {ids.dtype} {list(ids.shape)}"
        )
    if num_datasets is None or num_datasets < 1:
        raise ValueError(
            f"{OP}: num_datasets must be positive with dataset_ids, got {num_datasets}"
        )
    if weights is not None and (
        weights.shape != (num_datasets,) or not weights.dtype.is_floating_point
    ):
        raise ValueError(
            f"{OP}: dataset_weights must be float32 [{num_datasets}], got {weights.dtype} {list(weights.shape)}"
        )


def _check_terms(
    reduction: str, label_smoothing: float, softcap: float | None, z_loss: float
) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{OP}: reduction must be 'mean' or 'sum', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{OP}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{OP}: softcap must be positive, got {softcap}")
    if not z_loss >= 0:
        raise ValueError(f"{OP}: z_loss must not be negative, got {z_loss}")


def _check_sketch(
    examples: int, sketch: CountSketch | None, name: str | None, out: Tensor | None
) -> None:
    if sketch is None and name is None and out is None:
        return
    if sketch is None or name is None or out is None:
        raise ValueError(
            f"{OP}: sketch, sketch_name and sketch_out go together, got {sketch}, {name}, {out}"
        )
    shape = (examples, sketch.proj_dim)
    if out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"{OP}: sketch_out must be contiguous float32 {list(shape)}, got {out.dtype} {list(out.shape)}"
        )
