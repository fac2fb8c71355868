"""Loads the processor of a model that reads images: its tokenizer and its image processor."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_fast.data.template import load_tokenizer
from merit_fast.errors import InputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


def is_processor(tokenizer_or_processor: Any) -> bool:
    """Whether the object holds an image processor next to a tokenizer."""
    return getattr(tokenizer_or_processor, "image_processor", None) is not None


def tokenizer_of(tokenizer_or_processor: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that a processor holds, or the tokenizer itself."""
    inner = getattr(tokenizer_or_processor, "tokenizer", None)
    return tokenizer_or_processor if inner is None else inner  # type: ignore[no-any-return]


def reads_images(model: str) -> bool:
    """Whether a model's config.json describes a language model with a vision tower.

    Args:
        model: folder or hub id. Without a config.json the answer is no.
    """
    file = Path(model).expanduser() / "config.json"
    if file.parent.is_dir() and not _names_tower(file):
        return False  # without an import of transformers
    from transformers import PretrainedConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    try:
        config, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError):
        return False
    has_tower = config.get("vision_config") is not None
    return has_tower and config.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _names_tower(file: Path) -> bool:
    try:
        return '"vision_config"' in file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def load_tokenizer_or_processor(model: str) -> Any:
    """Loads the processor of a model that reads images, and the tokenizer of any other model.

    Args:
        model: folder or hub id.

    Raises:
        InputError: a file is missing or broken, or Pillow is not installed.
    """
    return load_processor(model) if reads_images(model) else load_tokenizer(model)


def load_processor(model: str) -> ProcessorMixin:
    """Loads the processor of a model that reads images, without its part for videos.

    The image processor is always the Pillow form, so the same row gives the same pixels whether
    torchvision is installed or not. Runs no code from the model's files.

    Args:
        model: folder or hub id.

    Raises:
        InputError: a file is missing or broken, the tokenizer is slow, or Pillow is not installed.
    """
    if importlib.util.find_spec("PIL") is None:
        raise InputError(f"{model}: reading images needs Pillow: pip install 'merit_fast[images]'")
    tokenizer = load_tokenizer(model)
    try:
        return _assemble(model, tokenizer)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise InputError(
            f"{model}: no image processor could be loaded: {one_line(error)}"
        ) from None


def _assemble(model: str, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    from transformers import AutoImageProcessor

    image_processor = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
        model, backend="pil"
    )
    processor_class = _processor_class(model)

    class WithoutVideo(processor_class):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    settings, _ = processor_class.get_processor_dict(model)
    parts = {"tokenizer": tokenizer, "image_processor": image_processor}
    arguments = [parts.get(name) for name in processor_class.get_attributes()]
    processor: ProcessorMixin = WithoutVideo.from_args_and_dict(arguments, settings)
    processor.__class__ = processor_class  # can be pickled, which a class made here cannot
    # one template for both, since branches and merged models save that of the tokenizer
    processor.chat_template = processor.chat_template or tokenizer.chat_template
    tokenizer.chat_template = processor.chat_template
    return processor


def _processor_class(model: str) -> Any:
    """The class that the model's files name, else the one that transformers maps to its config."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    settings, _ = transformers.ProcessorMixin.get_processor_dict(model)
    name = settings.get("processor_class")
    if name is None:
        options, _ = transformers.ImageProcessingMixin.get_image_processor_dict(model)
        name = options.get("processor_class")
    if name is not None and hasattr(transformers, name):
        return getattr(transformers, name)
    config = transformers.AutoConfig.from_pretrained(model)
    if type(config) not in PROCESSOR_MAPPING:
        raise ValueError(f"transformers has no processor for {type(config).__name__}")
    return PROCESSOR_MAPPING[type(config)]
