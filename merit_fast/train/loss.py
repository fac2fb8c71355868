"""The training loss of a batch, without its logits where the model's head is patched; packed rows."""

import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from merit_fast.data import Batch, Example, pack
from merit_fast.errors import InputError
from merit_fast.model import model_inputs, target_losses
from merit_fast.patch.head import DeferredLogits, deferred_cross_entropy, deferred_logits


def batch_loss(model: nn.Module, batch: Batch, divisor: int) -> tuple[Tensor, float]:
    """The sum over the batch's target tokens divided by ``divisor``, to take the gradient of; and the sum itself."""
    inputs, targets = model_inputs(model, batch)
    deferred = deferred_logits(model, inputs)
    if deferred is not None:
        kept = DeferredLogits(
            deferred.hidden[:, -targets.shape[1] - 1 : -1], deferred.head, deferred.steps
        )
        found = deferred_cross_entropy(kept, targets, None, divisor=float(divisor))
        if found is not None:
            return found.loss, float(found.example_loss.detach().double().sum())
    losses = target_losses(model, batch).loss
    return losses.sum() / divisor, float(losses.detach().double().sum())


def choose_attention(model: nn.Module) -> None:
    """flash_attention_2 where package, GPU and a 16-bit dtype are there; elsewhere the model's own choice (SDPA)."""
    parameter = next(model.parameters())
    if (
        parameter.device.type == "cuda"
        and parameter.dtype == torch.bfloat16
        and importlib.util.find_spec("flash_attn") is not None
        and getattr(model, "_supports_flash_attn", False)
    ):
        model.set_attn_implementation("flash_attention_2")  # type: ignore[operator]


def require_packing(model: nn.Module, examples: Sequence[Example]) -> None:
    """Lets an example change its neighbour in a packed row, to see that the neighbour's losses keep their bits.

    Raises:
        InputError: they do not: the model's attention runs over the borders of examples.
    """
    first, second = sorted([*examples, *examples], key=lambda example: len(example.input_ids))[:2]
    changed = Example(np.full_like(first.input_ids, second.input_ids[-1]), first.labels)
    training = model.training
    model.eval()
    with torch.no_grad():
        found = [
            target_losses(model, pack([neighbour, second], [0, 0]))
            for neighbour in (first, changed)
        ]
    model.train(training)
    before, after = (losses.loss[losses.example == 1] for losses in found)
    if not torch.equal(before, after):
        raise InputError(
            "train.packing: this model sees over the borders of examples in a row; set it to false"
        )
