"""Joins the images of a batch's examples into the pixel inputs of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from merit_fast.data.dataset import Example

if TYPE_CHECKING:
    import torch

TOKEN_TYPES = "mm_token_type_ids"  # 0 text, 1 image, 2 video: transformers' name


def join_media(
    examples: Sequence[Example], starts: Sequence[int], width: int
) -> dict[str, torch.Tensor]:
    """Pixel inputs of all examples end to end, and token types [B, T]; empty without images.

    Args:
        examples: B examples.
        starts: [B] the column at which each example begins in its row.
        width: T, columns of a row.
    """
    if all(example.media is None for example in examples):
        return {}
    import torch

    token_types = torch.zeros((len(examples), width), dtype=torch.long)
    parts: dict[str, list[torch.Tensor]] = {}
    for row, (example, start) in enumerate(zip(examples, starts, strict=True)):
        if example.media is not None:
            types = torch.as_tensor(example.media.token_types).long()
            token_types[row, start : start + len(types)] = types
            for name, tensor in example.media.tensors().items():
                parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()} | {
        TOKEN_TYPES: token_types
    }


def has_images(example: Example) -> bool:
    """Whether an example holds images. For a model that reads images, text may have media too."""
    return example.media is not None and bool(example.media.token_types.any())
