"""The training loss of a batch, without logits where the head is patched; packed rows checked."""

import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from merit_fast.data import IGNORED_LABEL, Batch, Example, count_target_tokens, pack
from merit_fast.errors import InputError
from merit_fast.model import model_inputs, target_losses
from merit_fast.patch.deferred import DeferredLogits, deferred_cross_entropy
from merit_fast.patch.head import deferred_logits

# Share of a whole neighbour's effect that is still rounding.
_LEAK_FP32 = 1e-3
_LEAK_LOW = 0.1
_EPS_LOW = 1e-3  # bf16 and fp16 are above


def batch_loss(model: nn.Module, batch: Batch, divisor: int) -> tuple[Tensor, float]:
    """(loss sum / ``divisor``, which has a gradient; loss sum) over the batch's target tokens."""
    inputs, targets = model_inputs(model, batch)
    deferred = deferred_logits(model, inputs)
    if deferred is not None:
        kept = DeferredLogits(
            deferred.hidden[:, -targets.shape[1] - 1 : -1], deferred.head, deferred.steps
        )
        losses = deferred_cross_entropy(kept, targets, None, divisor=float(divisor))
        if losses is not None:
            return losses.loss, float(losses.example_loss.detach().double().sum())
    token_losses = target_losses(model, batch).loss
    return token_losses.sum() / divisor, float(token_losses.detach().double().sum())


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
    usable = [example for example in examples if count_target_tokens(example.labels)]
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
