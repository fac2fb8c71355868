"""Rows with images: finds and checks image files, and turns them into a model's inputs.

Importing this package loads neither Pillow nor transformers.
"""

from merit_fast.data.images.encoder import ImageEncoder
from merit_fast.data.images.files import ImageFile, find_image, image_fingerprint, images_hash
from merit_fast.data.images.layout import ImageLayout, image_layout
from merit_fast.data.images.media import ImageMedia, media_reader
from merit_fast.data.images.processor import (
    is_processor,
    load_processor,
    load_tokenizer_or_processor,
    reads_images,
    tokenizer_of,
)

__all__ = [
    "ImageEncoder",
    "ImageFile",
    "ImageLayout",
    "ImageMedia",
    "find_image",
    "image_fingerprint",
    "image_layout",
    "images_hash",
    "is_processor",
    "load_processor",
    "load_tokenizer_or_processor",
    "media_reader",
    "reads_images",
    "tokenizer_of",
]
