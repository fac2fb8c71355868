"""Loads models with transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from merit_fast.errors import InputError, one_line
from merit_fast.model.dtype import DTYPES, Dtype, settle_dtype
from merit_fast.model.vision import reads_images

if TYPE_CHECKING:
    from torch import nn


def load_model(path: str, dtype: Dtype) -> "nn.Module":
    """Loads a language model in evaluation mode, on the GPU if there is one.

    A model that reads images is loaded with its vision tower, also for rows of text only.

    Args:
        path: directory or hub id.
        dtype: "bf16", "fp32" or "auto".

    Raises:
        InputError: transformers cannot load a causal language model from the path.
    """
    import torch
    from transformers import AutoConfig

    try:
        with no_loading_bar():
            config = AutoConfig.from_pretrained(path)
            model = auto_class(config).from_pretrained(
                path, dtype=getattr(torch, DTYPES[settle_dtype(dtype)])
            )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: is not a causal language model that transformers can load: {one_line(error)}"
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: nn.Module = model.eval().to(device)
    return loaded


def make_empty_model(path: str) -> "nn.Module":
    """A model by its config, without weights: its parameters have names and shapes only.

    Args:
        path: directory with a config.json that transformers can read.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model: nn.Module = auto_class(config).from_config(config)
    return model


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model of this config with all its parts."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """Silences transformers' progress bars for loading and saving, so that only ours is shown."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
