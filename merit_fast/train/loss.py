"""The training loss of a batch, without logits where the head is patched; packed rows checked."""

import importlib.util
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from merit_fast.data import Batch, Example, has_images, pack
from merit_fast.errors import InputError
from merit_fast.model import model_inputs, target_losses
from merit_fast.patch.deferred import DeferredLogits, deferred_cross_entropy
from merit_fast.patch.head import deferred_logits


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


def require_text(examples: Iterable[Example]) -> None:
    """Checks that no example to pack holds images.

    Raises:
        InputError: one does.
    """
    if any(has_images(example) for example in examples):
        raise InputError("train.packing: must be false where rows hold images, got true")


def require_packing(model: nn.Module, examples: Sequence[Example]) -> None:
    """Checks that an example's losses do not depend on its neighbour in a packed row.

    Raises:
        InputError: they do: the model's attention crosses the borders of examples; or an example
            holds images, whose positions and grids a packed row does not carry.
    """
    require_text(examples)
    first, second = sorted([*examples, *examples], key=lambda example: len(example.input_ids))[:2]
    changed = Example(np.full_like(first.input_ids, second.input_ids[-1]), first.labels)
    training = model.training
    model.eval()
    with torch.no_grad():
        rows = [pack([neighbour, second], [0, 0]) for neighbour in (first, changed)]
        row_losses = [target_losses(model, row) for row in rows]
    model.train(training)
    before, after = (losses.loss[losses.example == 1] for losses in row_losses)
    if not torch.equal(before, after):
        raise InputError(
            "train.packing: must be false: this model's attention crosses the borders of examples"
        )
