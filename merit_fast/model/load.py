"""Loads models with transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from merit_fast.errors import InputError, one_line
from merit_fast.model.dtype import DTYPES, Dtype, settle_dtype

if TYPE_CHECKING:
    from torch import nn


def load_model(path: str, dtype: Dtype) -> "nn.Module":
    """Loads a causal LM in evaluation mode, on the GPU if there is one.

    Args:
        path: directory or hub id.
        dtype: "bf16", "fp32" or "auto".

    Raises:
        InputError: transformers cannot load a causal LM from the path.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with no_loading_bar():
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, DTYPES[settle_dtype(dtype)])
            )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: is not a causal language model that transformers can load: {one_line(error)}"
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: nn.Module = model.eval().to(device)  # type: ignore[no-untyped-call]
    return loaded


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
