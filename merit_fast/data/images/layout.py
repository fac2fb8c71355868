"""The form in which one model takes images: its placeholders, its pixel inputs, its token types.

Everything comes from the processor's own call, so a layout needs no entry here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from merit_fast.errors import InputError, one_line

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image as Pixels
    from transformers import ProcessorMixin

_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # names in forwards that tell images apart
_TEXT_INPUTS = ("input_ids", "attention_mask", *_TOKEN_TYPES)
_CACHED_SIZES = 1 << 12


class ImageLayout:
    """A processor's way with images.

    Args:
        processor: a processor with an image processor and a fast tokenizer.

    Raises:
        InputError: the processor does not tell how a placeholder becomes an image's tokens.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self._replacements: dict[Any, tuple[str, int]] = {}  # "": the placeholder, repeated
        try:
            self.placeholder = str(processor.image_token)  # type: ignore[attr-defined]
            self.token_ids = frozenset(int(i) for i in processor.image_token_ids if i is not None)
            self._probe = self._call([_blank((64, 64))], return_text_replacement_offsets=True)
        except Exception as error:  # a processor is another library's program
            name = type(processor).__name__
            raise InputError(f"{name}: cannot be used for images: {one_line(error)}") from None
        if "text_replacement_offsets" not in self._probe:
            raise InputError(
                f"{type(processor).__name__}: images need a newer transformers (5.23 serves)"
            )

    @cached_property
    def token_texts(self) -> tuple[str, ...]:
        """The tokens of images as text, such as <|image_pad|>."""
        ids = sorted(self.token_ids)
        return tuple(self.processor.tokenizer.convert_ids_to_tokens(ids))

    @cached_property
    def token_types_name(self) -> str | None:
        """Name in the model's forward of the types of tokens; None if it takes none."""
        return next((name for name in _TOKEN_TYPES if name in self._probe), None)

    def replacement(self, size: tuple[int, int], num_images: int = 1) -> str:
        """The text that replaces the placeholder of an image.

        It depends on the image's size only: a blank image of that size stands in. In some layouts
        it also depends on whether the text holds further images.

        Args:
            size: (width, height) in pixels.
            num_images: images of the text.

        Raises:
            InputError: the processor refuses the size.
        """
        return self._replaced(size, num_images)[0]

    def num_tokens(self, size: tuple[int, int], num_images: int = 1) -> int:
        """Tokens of an image of this size (width, height) that take part of its pixels."""
        return self._replaced(size, num_images)[1]

    @cached_property
    def shrinks_several(self) -> bool:
        """Whether an image takes other tokens in a text with further images (LLaVA-OneVision)."""
        made = self._call([_blank((64, 64))] * 2, return_text_replacement_offsets=True)
        return _first_replacement(made) != _first_replacement(self._probe)

    def _replaced(self, size: tuple[int, int], num_images: int) -> tuple[str, int]:
        try:
            images = 2 if num_images > 1 and self.shrinks_several else 1
            key = (images, self._key(size))
            if key not in self._replacements:
                made = self._call([_blank(size)] * images, return_text_replacement_offsets=True)
                if len(self._replacements) >= _CACHED_SIZES:
                    self._replacements.clear()
                text = "" if self._counts_patches else _first_replacement(made)
                count = self.count(np.asarray(made["input_ids"][0])) // images
                self._replacements[key] = text, count
        except Exception as error:  # such as: a side is 200 times as long as the other
            raise InputError(f"the processor refuses the image: {one_line(error)}") from None
        text, count = self._replacements[key]
        return text or self.placeholder * count, count

    def _key(self, size: tuple[int, int]) -> Any:
        """A key that sizes with equal replacements share: the number of patches where it decides.

        It decides where the replacement only repeats the placeholder. ``pixel_inputs`` checks it.
        """
        if not self._counts_patches:
            return size
        width, height = size
        counter = self.processor.image_processor.get_number_of_image_patches
        return int(counter(height, width, {}))

    @cached_property
    def _counts_patches(self) -> bool:
        text = _first_replacement(self._probe)
        repeats = text == self.placeholder * (len(text) // len(self.placeholder))
        has_counter = hasattr(self.processor.image_processor, "get_number_of_image_patches")
        return repeats and has_counter and "image_grid_thw" in self._probe

    def is_image(self, input_ids: Any) -> Any:
        """[T] bool: the tokens that stand for parts of an image."""
        return np.isin(input_ids, list(self.token_ids))

    def count(self, input_ids: Any) -> int:
        """Tokens that stand for parts of an image."""
        return int(self.is_image(input_ids).sum())

    def pixel_inputs(
        self, images: Sequence[Pixels], num_tokens: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Pixel inputs of the images of one example, by the names of the model's forward.

        Args:
            images: decoded images, in their order in the text.
            num_tokens: tokens that the example holds for each of them.

        Raises:
            InputError: the images demand another number of tokens.
        """
        made = self._call(images, return_tensors="pt")
        found = self.count(np.asarray(made["input_ids"][0]))
        if found != sum(num_tokens):
            rule = f"must have the {sum(num_tokens)} tokens that the text holds for them"
            raise InputError(f"images: {rule}, got {found}")
        return {name: value for name, value in made.items() if name not in _TEXT_INPUTS}

    def _call(self, images: Sequence[Pixels], **options: Any) -> Any:
        return self.processor(
            text=[self.placeholder * len(images)],
            images=[list(images)],
            add_special_tokens=False,
            **options,
        )


@lru_cache(maxsize=8)
def image_layout(processor: ProcessorMixin) -> ImageLayout:
    """The layout of a processor, made once per process."""
    return ImageLayout(processor)


def _first_replacement(made: Any) -> str:
    return str(made["text_replacement_offsets"][0][0]["replacement"])


def _blank(size: tuple[int, int]) -> Pixels:
    from PIL import Image as pillow

    return pillow.new("RGB", size)
