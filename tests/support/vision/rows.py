"""Examples with images, made by a layout's own processor, independently of the data room."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merit_fast.data import IGNORED_LABEL, Example

# One user turn per row: sizes (width, height) of its images, and how many tokens are targets.
ROWS: tuple[tuple[tuple[tuple[int, int], ...], int], ...] = (
    (((56, 56),), 5),
    ((), 4),
    (((84, 56), (56, 84)), 7),
    (((56, 56),), 3),
)


@dataclass(frozen=True)
class PixelMedia:
    """Pixel inputs that stay in memory."""

    token_types: np.ndarray
    token_types_name: str | None
    pixels: dict[str, torch.Tensor]

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.pixels

    def cut(self, length: int) -> "PixelMedia":
        """No test cuts these examples."""
        raise NotImplementedError

    def reference(self, folder: Path | None = None) -> dict[str, Any]:
        """No test stores these examples."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hex digits of the pixels."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.pixels.items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()


def make_image(width: int, height: int, seed: int) -> Any:
    """A random picture."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def processed_rows(processor: Any, rows: Sequence[Any] = ROWS) -> list[dict[str, Any]]:
    """The processor's own output for each row, with labels on the row's last tokens."""
    made = []
    for number, (sizes, targets) in enumerate(rows):
        images = [make_image(size[0], size[1], 10 * number + i) for i, size in enumerate(sizes)]
        parts = [{"type": "image"} for _ in images]
        parts.append({"type": "text", "text": f"which digit is it? row {number}"})
        messages = [{"role": "user", "content": parts}]
        text = processor.tokenizer.apply_chat_template(
            messages,
            chat_template=processor.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        options = {"images": [images]} if images else {}
        inputs = dict(processor(text=[f"{text}it is 7"], return_tensors="pt", **options))
        labels = inputs["input_ids"].clone()
        labels[:, :-targets] = IGNORED_LABEL
        made.append(inputs | {"labels": labels})
    return made


def as_example(row: dict[str, Any]) -> Example:
    """The example that one processed row stands for."""
    tensors = dict(row)
    labels = tensors.pop("labels")[0].numpy().astype(np.int32)
    ids = tensors.pop("input_ids")[0].numpy().astype(np.int32)
    tensors.pop("attention_mask")
    name = next((n for n in ("mm_token_type_ids", "token_type_ids") if n in tensors), None)
    types = np.zeros(len(ids), np.int8) if name is None else tensors.pop(name)[0].numpy()
    return Example(ids, labels, media=PixelMedia(types.astype(np.int8), name, tensors))
