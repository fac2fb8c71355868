"""Chooses between a model in memory and one whose layers are read one at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from merit_fast.errors import InputError
from merit_fast.model.adapters import is_adapter
from merit_fast.model.dtype import DTYPES, Dtype, settle_dtype
from merit_fast.model.files import resolve_model, weight_files
from merit_fast.model.layered.load import load_layered
from merit_fast.model.layered.mapped import map_tensors_of
from merit_fast.model.load import load_model
from merit_fast.model.memory import available_memory_bytes

Memory = Literal["auto", "whole", "layers"]
_ROOM = 1.1  # memory for a model and its activations over its parameters


def load_model_for(
    path: str, dtype: Dtype, memory: Memory, notify: Callable[[str], None]
) -> nn.Module:
    """Loads a model as ``load_model`` or as ``load_layered`` does.

    Args:
        path: directory or hub id, or with "whole" the directory of an adapter.
        dtype: as in ``load_model``.
        memory: "whole": in memory; "layers": layer by layer; "auto": layer by layer if the memory
            that is available now is less than 1.1 times the model's parameters.
        notify: gets one line if "auto" chooses the layers.

    Raises:
        InputError: as ``load_model`` and ``load_layered``.
    """
    if memory == "auto" and (needed := model_bytes(path, dtype)) is not None:
        available = _available_bytes()
        if needed * _ROOM > available:
            notify(
                f"the model takes {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are "
                "available: its layers are read one at a time"
            )
            memory = "layers"
    return load_layered(path, dtype) if memory == "layers" else load_model(path, dtype)


def model_bytes(path: str, dtype: Dtype) -> int | None:
    """Bytes of a model's parameters in a dtype, by the headers of its safetensors files.

    None: an adapter, a quantised model or one without such files, which only memory takes.
    """
    from transformers import AutoConfig

    if is_adapter(Path(path)):
        return None
    try:
        folder = resolve_model(path)
        tensors = map_tensors_of(weight_files(folder)).values()
        config = AutoConfig.from_pretrained(folder)
    except (InputError, OSError, ValueError, KeyError):
        return None  # ``load_model`` raises the error
    if getattr(config, "quantization_config", None) is not None:
        return None
    size: int = getattr(torch, DTYPES[settle_dtype(dtype)]).itemsize
    return sum(size * torch.Size(tensor.shape).numel() for tensor in tensors)


def _available_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return available_memory_bytes()
