"""Attention masks of examples that are trees."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def tree_masks(
    model: "nn.Module", visible: "Tensor", positions: "Tensor"
) -> "Tensor | dict[str, Tensor]":
    """Masks that are added to attention scores; by type of layer where a model has several.

    A layer with a window of w positions, or with chunks of c positions, sees

        visible[q, k] and positions[q] - positions[k] < w
        visible[q, k] and positions[q] // c == positions[k] // c

    Args:
        model: a language model of transformers.
        visible: [B, 1, T, T] bool, the keys that each query sees.
        positions: [B, T] positions of the tokens in their texts.

    Raises:
        ValueError: the model has layers of another type, such as recurrent ones.
    """
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    dtype = next(model.parameters()).dtype
    window = getattr(config, "sliding_window", None)
    types = sorted(set(getattr(config, "layer_types", None) or ()))
    if not types:
        types = ["sliding_attention" if window is not None else "full_attention"]
    apart = positions[:, None, :, None] - positions[:, None, None, :]
    masks = {}
    for name in types:
        if name == "full_attention":
            seen = visible
        elif name == "sliding_attention" and window is not None:
            seen = visible & (apart < window)
        elif name == "chunked_attention":
            chunk = positions // config.attention_chunk_size
            seen = visible & (chunk[:, None, :, None] == chunk[:, None, None, :])
        else:
            raise ValueError(f"tree_masks: no mask for layers of the type {name}")
        masks[name] = _added(seen, dtype)
    return masks if len(masks) > 1 else masks[types[0]]


def _added(seen: "Tensor", dtype: Any) -> "Tensor":
    """0 where a key is seen, else the lowest number of ``dtype``."""
    import torch

    hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return hidden.masked_fill_(~seen, torch.finfo(dtype).min)
