"""Arguments of a model's forward for a batch, and the attention that suits it."""

import inspect
from typing import TYPE_CHECKING, Any

from merit_fast.model.trees import tree_masks
from merit_fast.model.vision import (
    TOKEN_TYPES,
    computes_positions,
    forget_positions,
    media_inputs,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merit_fast.data import Batch

_SHORT_TOKENS = 512


def model_inputs(
    model: "nn.Module", batch: "Batch", plain_attention: bool = False
) -> "tuple[dict[str, Any], Tensor]":
    """Arguments of the model's forward, and targets [B, n] of its positions ``[-n - 1 : -1]``.

    A packed row has no mask: transformers makes a block-diagonal one from restarting positions. A
    batch with trees has the masks of ``tree_masks``.
    Images come with the batch; a model with M-RoPE computes their positions itself.
    """
    from merit_fast.data import PackedBatch

    device = next(model.parameters()).device
    width = batch.input_ids.shape[1]
    _choose_attention(model, device.type, 0 if plain_attention else width)
    keep = min(-(-batch.logits_to_keep // 8) * 8, width)  # few shapes: each costs a kernel's set-up
    accepted = inspect.signature(model.forward).parameters
    optional: dict[str, Any] = {"logits_to_keep": keep, "use_cache": False}
    if not computes_positions(batch.media, accepted):
        positions = batch.position_ids.to(device)
        if isinstance(batch, PackedBatch) and TOKEN_TYPES in accepted:
            positions = positions.expand(4, -1, -1)  # of the text, then the three of M-RoPE
        optional["position_ids"] = positions
    if batch.visible is not None:
        optional["output_router_logits"] = False  # the routers' loss, unused here, wants a 2-D mask
    forget_positions(model)
    inputs = {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": _attention_mask(model, batch, device),
        **{name: value for name, value in optional.items() if name in accepted},
        **media_inputs(batch.media, accepted, device),
    }
    return inputs, batch.labels[:, -keep + 1 :].to(device)


def _attention_mask(
    model: "nn.Module", batch: "Batch", device: Any
) -> "Tensor | dict[str, Tensor] | None":
    from merit_fast.data import PackedBatch

    if batch.visible is not None:
        return tree_masks(model, batch.visible.to(device), batch.position_ids.to(device))
    return None if isinstance(batch, PackedBatch) else batch.attention_mask.to(device)


def _choose_attention(model: "nn.Module", device_type: str, width: int) -> None:
    """Sets plain attention for short batches on a CPU, and for width 0 on any device.

    On a CPU torch's fused attention takes twice the time of plain attention on short rows.
    """
    if (device_type != "cpu" and width) or not hasattr(model, "set_attn_implementation"):
        return
    wanted = "eager" if width <= _SHORT_TOKENS else "sdpa"
    if model.config._attn_implementation != wanted:  # type: ignore[union-attr]
        try:
            model.set_attn_implementation(wanted)  # type: ignore[operator]
        except ValueError:  # the architecture lacks this attention and keeps its default
            return
