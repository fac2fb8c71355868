"""Joins the images of a batch's examples into the pixel inputs of one forward."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from merit_fast.data.dataset import Example, Media

if TYPE_CHECKING:
    import torch

_MAX_THREADS = 8
_SIZED = ("image_sizes", "pixel_attention_mask")  # with these, a model knows padding from pixels


def join_media(
    examples: Sequence[Example], starts: Sequence[int], width: int
) -> dict[str, torch.Tensor]:
    """Pixel inputs of all examples end to end, and token types [B, T]; empty without media.

    A model that takes no token types gets none.

    Args:
        examples: B examples; one without media is text.
        starts: [B] the column at which each example begins in its row.
        width: T, columns of a row.

    Raises:
        ValueError: pixel inputs differ in shape, and padding would change what the model sees.
    """
    types_names = [example.media.token_types_name for example in examples if example.media]
    if not types_names:
        return {}
    import torch

    parts: dict[str, list[torch.Tensor]] = {}
    token_types = torch.zeros((len(examples), width), dtype=torch.long)
    for row, (example, start) in enumerate(zip(examples, starts, strict=True)):
        if example.media is not None:
            types = torch.as_tensor(example.media.token_types).long()
            token_types[row, start : start + len(types)] = types
    for tensors in _read_all([example.media for example in examples if example.media]):
        for name, tensor in tensors.items():
            parts.setdefault(name, []).append(tensor)
    may_pad = any(name in parts for name in _SIZED)
    joined = {name: _join(name, tensors, may_pad) for name, tensors in parts.items()}
    types_name = types_names[0]
    return joined if types_name is None else {**joined, types_name: token_types}


def _read_all(media: Sequence[Media]) -> list[dict[str, torch.Tensor]]:
    """The pixel inputs of examples in their order; decoding runs in threads, outside Python."""
    threads = min(len(media), os.cpu_count() or 1, _MAX_THREADS)
    if threads < 2:
        return [item.tensors() for item in media]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda item: item.tensors(), media))


def _join(name: str, tensors: Sequence[torch.Tensor], may_pad: bool) -> torch.Tensor:
    """Joins along dim 0; the other dims are padded with zeros at their ends where that is exact."""
    import torch

    shapes = [tensor.shape[1:] for tensor in tensors]
    if all(shape == shapes[0] for shape in shapes):
        return torch.cat(list(tensors))
    if not may_pad or len({len(shape) for shape in shapes}) > 1:
        raise ValueError(f"{name}: examples of a batch must agree in shape, got {shapes}")
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    padded = []
    for tensor in tensors:
        missing = [want - have for want, have in zip(largest, tensor.shape[1:], strict=True)]
        borders = [border for gap in reversed(missing) for border in (0, gap)]
        padded.append(torch.nn.functional.pad(tensor, borders))
    return torch.cat(padded)
