"""Loads models with transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_fast.errors import InputError, one_line
from merit_fast.model.adapters import adapter_start, is_adapter
from merit_fast.model.dtype import DTYPES, Dtype, settle_dtype
from merit_fast.model.vision import reads_images

if TYPE_CHECKING:
    from torch import nn


def load_model(
    path: str, dtype: Dtype, start: str | None = None, quantization: Any = None
) -> "nn.Module":
    """Loads a language model in evaluation mode, on the GPU if there is one.

    A model that reads images is loaded with its vision tower, also for rows of text only. A LoRA
    adapter is loaded as the model that it makes of its start.

    Args:
        path: directory or hub id, or the directory of an adapter.
        dtype: "bf16", "fp32" or "auto".
        start: the model that an adapter belongs to. None: the one that its config names.
        quantization: a config of transformers that quantises the weights. None: as they are.

    Raises:
        InputError: transformers cannot load a causal language model from the path.
    """
    import torch
    from transformers import AutoConfig

    if is_adapter(Path(path)):
        return load_adapter(Path(path), dtype, start)
    options = {} if quantization is None else {"quantization_config": quantization}
    try:
        with no_loading_bar():
            config = AutoConfig.from_pretrained(path)
            model = auto_class(config).from_pretrained(
                path, dtype=getattr(torch, DTYPES[settle_dtype(dtype)]), **options
            )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: is not a causal language model that transformers can load: {one_line(error)}"
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: nn.Module = model.eval() if quantization is not None else model.eval().to(device)
    return loaded


def load_adapter(path: Path, dtype: Dtype, start: str | None = None) -> "nn.Module":
    """Loads a LoRA adapter as its start with the change added to the weights.

    Each weight is rounded once to the start's dtype, as in a merge of the adapter.

    Args:
        path: PEFT's folder.
        dtype: as in ``load_model``.
        start: as in ``load_model``.

    Raises:
        InputError: PEFT is not installed, the start is not there, or the two do not fit.
    """
    named = start or adapter_start(path)
    model = load_model(named, dtype)
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError(f"{path}: an adapter needs the package peft; pip install peft") from None
    try:
        adapted = PeftModel.from_pretrained(model, str(path))  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{path}: does not fit {named}: {one_line(error)}") from None
    whole: nn.Module = adapted.merge_and_unload(progressbar=False).eval()
    return whole


def without_router_logits(model: "nn.Module") -> None:
    """Switches off the router logits of a mixture of experts, in place.

    They serve the routers' loss in training; with them transformers' ``generate`` fails for a
    padded batch.
    """
    config: Any = getattr(model, "config", None)
    text: Any = None if config is None else config.get_text_config()
    if getattr(text, "output_router_logits", False):
        text.output_router_logits = False


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
