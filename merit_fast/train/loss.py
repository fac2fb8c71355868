"""The training loss of a batch, without logits where the head is patched; packed rows checked."""

import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from merit_fast.data import (
    IGNORED_LABEL,
    Batch,
    Dataset,
    Example,
    PackedBatch,
    count_target_tokens,
    has_images,
    pack,
)
from merit_fast.data.tree import expand
from merit_fast.errors import InputError, MeritFastError
from merit_fast.model import model_inputs, score_batch, target_losses
from merit_fast.patch.deferred import deferred_cross_entropy
from merit_fast.patch.head import deferred_output

# Share of a whole neighbour's effect that is still rounding.
_LEAK_FP32 = 1e-3
_LEAK_LOW = 0.1
_EPS_LOW = 1e-3  # bf16 and fp16 are above


class BatchLoss(NamedTuple):
    """The loss of one micro-batch."""

    loss: Tensor  # scalar with a gradient: loss sum / divisor, and the routers' loss
    dataset_losses: Tensor  # [D] float64 on the CPU: nats of each dataset's target tokens
    dataset_tokens: Tensor  # [D] int64 on the CPU: its target tokens


def batch_loss(
    model: nn.Module,
    batch: Batch,
    divisor: int,
    num_datasets: int = 1,
    router_factor: float = 0.0,
) -> BatchLoss:
    """Cross-entropy of the batch's target tokens, without logits where the head is patched.

        loss = sum of the target tokens' losses / divisor + router_factor * aux_loss

    Args:
        model: in any mode.
        batch: its ``dataset_ids`` are below ``num_datasets``.
        divisor: target tokens of the whole step.
        num_datasets: D.
        router_factor: of the load-balancing loss that a mixture of experts returns; 0: none.

    Raises:
        MeritFastError: the model returns no such loss.
    """
    inputs, targets = model_inputs(model, batch)
    ids = batch.dataset_ids
    output = deferred_output(model, inputs)
    losses = None
    if output is not None:
        count = targets.shape[1]
        kept = output.logits.of(output.logits.hidden[:, -count - 1 : -1])
        options = {"dataset_ids": ids.to(targets.device), "num_datasets": num_datasets}
        if isinstance(batch, PackedBatch):
            first = batch.input_ids.shape[1] - count - 1
            borders = (batch.cu_seqlens - first).clamp(0, count)
            options["cu_seqlens"] = borders.to(targets.device)
        losses = deferred_cross_entropy(kept, targets, None, divisor=float(divisor), **options)
    if losses is not None:
        router_loss = _router_loss(output, router_factor)
        sums = losses.dataset_loss.detach().double().cpu()
        return BatchLoss(losses.loss + router_loss, sums, losses.dataset_tokens.cpu())
    output = model(**inputs)
    tokens = score_batch(output.logits, targets, batch)
    dataset = ids[tokens.example.cpu()]
    sums = torch.zeros(num_datasets, dtype=torch.float64)
    sums.index_add_(0, dataset, tokens.loss.detach().double().cpu())
    counts = torch.bincount(dataset, minlength=num_datasets)
    loss = tokens.loss.sum() / divisor + _router_loss(output, router_factor)
    return BatchLoss(loss, sums, counts)


def router_coefficient(model: nn.Module) -> float:
    """The factor of a mixture of experts' load-balancing loss in training; 0 for other models.

    transformers adds ``router_aux_loss_coef * aux_loss`` to the loss where the config has
    ``output_router_logits: true``.

    Raises:
        InputError: the config has it, and no coefficient.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    if not getattr(text, "output_router_logits", False):
        return 0.0
    factor = getattr(model, "router_aux_loss_coef", getattr(text, "router_aux_loss_coef", None))
    if factor is None:
        raise InputError(
            "train: output_router_logits of the base's config.json must be false, "
            f"{type(model).__name__} has no router_aux_loss_coef"
        )
    return float(factor)


def _router_loss(output: Any, factor: float) -> Tensor | float:
    if not factor:
        return 0.0
    auxiliary = getattr(output, "aux_loss", None)
    if auxiliary is None:
        raise MeritFastError("train: the model returns no aux_loss with output_router_logits")
    loss: Tensor = factor * auxiliary
    return loss


def choose_attention(model: nn.Module) -> None:
    """Sets flash_attention_2 on a GPU in bf16 if flash-attn is installed."""
    parameter = next(model.parameters())
    if (
        parameter.device.type == "cuda"
        and parameter.dtype == torch.bfloat16
        and importlib.util.find_spec("flash_attn") is not None
        and getattr(model, "_supports_flash_attn", False)
    ):
        model.set_attn_implementation("flash_attention_2")  # type: ignore[operator]


def require_text(datasets: Sequence[Dataset]) -> None:
    """Checks that no example to pack holds images.

    Raises:
        InputError: one does.
    """
    for dataset in datasets:
        if not dataset.is_plain and any(has_images(example) for example in dataset.examples):
            raise InputError(
                f"train.packing: must be false for dataset {dataset.name}: its rows hold images"
            )


def require_packing(model: nn.Module, examples: Sequence[Example]) -> None:
    """Checks that an example's losses do not depend on its neighbour in a packed row.

        change = mean |loss after one neighbour - loss after another|
        whole = the mean where the neighbour is part of the example's own text
        allowed: change <= share(dtype) * whole + eps(dtype) / 4 * (1 + mean loss)

    A model of experts rounds an example's values by its neighbours, since they share a product of
    matrices; a model that sees over the border changes them as much as a longer text does.

    Args:
        model: in any mode.
        examples: some examples; two short ones of them are tried.

    Raises:
        InputError: they do: the model's attention crosses the borders of examples.
    """
    texts = [text for example in examples for text in expand(example)]
    usable = [text for text in texts if count_target_tokens(text.labels)]
    if not usable:
        return
    first, second = sorted([*usable, *usable], key=lambda example: len(example.input_ids))[:2]
    changed = Example(np.full_like(first.input_ids, second.input_ids[-1]), first.labels)
    training = model.training
    model.eval()
    with torch.no_grad():
        packed = [_second_losses(model, [other, second]) for other in (first, changed)]
        joined = [_second_losses(model, [_join(other, second)]) for other in (first, changed)]
    model.train(training)
    count = count_target_tokens(second.labels)
    change = _mean_difference(packed, count)
    eps = torch.finfo(next(model.parameters()).dtype).eps
    share = _LEAK_FP32 if eps < _EPS_LOW else _LEAK_LOW
    whole = _mean_difference(joined, count)
    if not change <= share * whole + eps / 4 * (1 + float(packed[0].mean())):
        raise InputError(
            "train.packing: must be false: this model's attention crosses the borders of examples"
        )


def _join(first: Example, second: Example) -> Example:
    """Both as one text."""
    border = second.labels.copy()
    border[:1] = IGNORED_LABEL
    ids = np.concatenate([first.input_ids, second.input_ids])
    return Example(ids, np.concatenate([first.labels, border]))


def _second_losses(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    return target_losses(model, pack(examples, [0] * len(examples))).loss


def _mean_difference(losses: Sequence[Tensor], count: int) -> float:
    """Mean difference of the last ``count`` losses."""
    one, other = (loss[-count:] for loss in losses)
    return float((one - other).abs().mean())
