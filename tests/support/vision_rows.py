"""Examples with images, made by a layout's own processor, independently of the data room."""

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
    pixels: dict[str, torch.Tensor]

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.pixels


def load_processor(folder: Path, layout: Any) -> Any:
    """The layout's processor from its parts, without its video processor, which needs more."""
    import transformers

    image_processor = getattr(transformers, layout.image_processor).from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor_class = getattr(transformers, layout.processor)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    parts = {"image_processor": image_processor, "tokenizer": tokenizer}
    options = {**layout.processor_options, "chat_template": template}
    kept = [a for a in processor_class.get_attributes() if a != "video_processor"]
    bare = type(layout.processor, (processor_class,), {})
    bare.get_attributes = classmethod(lambda cls: kept)  # type: ignore[attr-defined]
    return bare(**parts, **options)


def make_image(width: int, height: int, seed: int) -> Any:
    """A random picture."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def processed_rows(processor: Any, rows: Sequence[Any] = ROWS) -> list[dict[str, Any]]:
    """The processor's own output for each row, with labels on the row's last tokens."""
    made = []
    for number, (sizes, targets) in enumerate(rows):
        images = [make_image(*size, seed=10 * number + i) for i, size in enumerate(sizes)]
        parts = [{"type": "image"} for _ in images]
        parts.append({"type": "text", "text": f"which digit is it? row {number}"})
        messages = [{"role": "user", "content": parts}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True) + "it is 7"
        options = {"images": [images]} if images else {}
        inputs = dict(processor(text=[text], return_tensors="pt", **options))
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
    types = tensors.pop("mm_token_type_ids", tensors.pop("token_type_ids", None))
    token_types = np.zeros(len(ids), np.int8) if types is None else types[0].numpy()
    media = PixelMedia(token_types.astype(np.int8), tensors) if tensors else None
    return Example(ids, labels, media=media)
