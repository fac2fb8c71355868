"""The images of one example: kept as files, read when a batch is made."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.images.files import ImageFile, image_fingerprint
from merit_fast.data.images.layout import ImageLayout, image_layout
from merit_fast.data.images.processor import is_processor
from merit_fast.errors import InputError
from merit_fast.manifests.atomic import write_bytes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PlacedImage:
    """An image and the ranges of tokens that stand for its parts.

    A layout with rows and columns of tiles has several ranges.
    """

    file: ImageFile
    ranges: tuple[tuple[int, int], ...]  # half-open

    @property
    def num_tokens(self) -> int:
        return sum(past - first for first, past in self.ranges)


@dataclass(frozen=True, eq=False)
class ImageMedia:
    """The images of one example, possibly none, for a model that reads images.

    Attributes:
        length: T, tokens of the example.
        images: in their order in the text.
        layout: the layout of the model's processor.
    """

    length: int
    images: tuple[PlacedImage, ...]
    layout: ImageLayout

    @property
    def token_types(self) -> NDArray[np.int8]:
        """[T] 0 for text, 1 for an image."""
        types = np.zeros(self.length, np.int8)
        for image in self.images:
            for first, past in image.ranges:
                types[first:past] = 1
        return types

    @property
    def token_types_name(self) -> str | None:
        """Name of the token types in the model's forward; None if it takes none."""
        return self.layout.token_types_name

    def tensors(self) -> dict[str, torch.Tensor]:
        """Reads the images. Pixel inputs by the names of the model's forward; empty without images.

        Raises:
            InputError: a file is missing, damaged, or not the one that the rows were read with.
        """
        if not self.images:
            return {}
        pixels = [image.file.pixels() for image in self.images]
        try:
            return self.layout.pixel_inputs(pixels, [image.num_tokens for image in self.images])
        except InputError as error:
            raise InputError(f"{self.images[0].file.name}: {error}") from None

    def fingerprint(self) -> str:
        """32 hex digits of the contents of the images, in their order; reads the files.

        Raises:
            InputError: a file cannot be read.
        """
        return image_fingerprint(image.file for image in self.images)

    def cut(self, length: int) -> ImageMedia:
        """The media of the example's first ``length`` tokens.

        Raises:
            ValueError: the cut is inside an image.
        """
        kept = tuple(image for image in self.images if image.ranges[0][0] < length)
        if any(image.ranges[-1][1] > length for image in kept):
            raise ValueError(f"an example cannot be cut at token {length}, inside an image")
        return ImageMedia(length, kept, self.layout)

    def reference(self, folder: Path | None = None) -> dict[str, Any]:
        """A JSON object from which ``from_reference`` makes the media again.

        Args:
            folder: where the bytes of images that are no files go, each under its hash; None: the
                object holds them in base64.
        """
        images = [_image_reference(image, folder) for image in self.images]
        return {"length": self.length, "images": images}

    @classmethod
    def from_reference(cls, reference: Mapping[str, Any], layout: ImageLayout) -> ImageMedia:
        """The media of a reference. No file is read until ``tensors`` is called."""
        images = [_from_image_reference(item) for item in reference["images"]]
        return cls(reference["length"], tuple(images), layout)


def media_reader(tokenizer_or_processor: Any) -> Callable[[Mapping[str, Any]], ImageMedia] | None:
    """Makes the media of references for a processor; None for a tokenizer."""
    if not is_processor(tokenizer_or_processor):
        return None
    layout = image_layout(tokenizer_or_processor)
    return lambda reference: ImageMedia.from_reference(reference, layout)


def place_images(
    files: tuple[ImageFile, ...], input_ids: NDArray[np.int32], layout: ImageLayout
) -> ImageMedia:
    """Finds the tokens of each image.

    Args:
        files: the images in their order in the text.
        input_ids: [T] tokens with every placeholder replaced.
        layout: the layout of the model's processor.

    Raises:
        InputError: the tokens hold more or fewer image tokens than the images demand.
    """
    positions = np.flatnonzero(layout.is_image(input_ids))
    counts = [layout.num_tokens(file.size, len(files)) for file in files]
    if sum(counts) != len(positions):
        rule = f"must hold {sum(counts)} image tokens for {len(files)} images"
        raise InputError(f"the tokens {rule}, got {len(positions)}")
    images = []
    past = 0
    for file, count in zip(files, counts, strict=True):
        own = positions[past : past + count]
        past += count
        images.append(PlacedImage(file, _ranges(own)))
    return ImageMedia(len(input_ids), tuple(images), layout)


def _ranges(positions: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    runs = np.split(positions, breaks)
    return tuple((int(run[0]), int(run[-1]) + 1) for run in runs)


def _image_reference(image: PlacedImage, folder: Path | None) -> dict[str, Any]:
    file = image.file
    reference: dict[str, Any] = {
        "num_bytes": file.num_bytes,
        "size": list(file.size),
        "ranges": [list(borders) for borders in image.ranges],
    }
    if file.content is None:
        return {**reference, "path": file.path}
    if folder is None:
        return {**reference, "content": base64.b64encode(file.content).decode()}
    return {**reference, "path": _keep(file.content, folder)}


def _from_image_reference(reference: Mapping[str, Any]) -> PlacedImage:
    content = reference.get("content")
    width, height = reference["size"]
    file = ImageFile(
        reference.get("path"),
        None if content is None else base64.b64decode(content),
        reference["num_bytes"],
        (width, height),
    )
    return PlacedImage(file, tuple((first, past) for first, past in reference["ranges"]))


def _keep(content: bytes, folder: Path) -> str:
    """Writes the bytes of an image under their hash and returns the path."""
    path = folder / hashlib.sha256(content).hexdigest()
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    return str(path.resolve())
