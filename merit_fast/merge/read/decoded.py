"""Inputs decoded while they are read: 8-bit floats with scales, adapters on a base."""

import math
from dataclasses import fields, replace
from typing import Any

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import FLOAT_DTYPES, FP8_DTYPES
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.adapters.adapter import is_adapter, read_adapter
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.dcp.opening import open_checkpoint
from merit_fast.merge.read.entries import DecodedEntry, Scales, TensorEntry
from merit_fast.merge.read.files import folder_of, quote, read_json
from merit_fast.merge.read.names.adapted import put_on_named_base
from merit_fast.merge.read.names.wrappers import without_wrappers
from merit_fast.merge.read.remote import Location

_SCALE_SUFFIXES = ("_scale_inv", "_scale")
_LAYER_SCALES = ("input_scale", "output_scale")


def read_input(
    path: Location,
    base: Checkpoint | None,
    subtree: str | None = None,
    config: Location | None = None,
) -> Checkpoint:
    """One model to merge: a checkpoint, of 8-bit floats too, or a LoRA adapter on the base.

    Raises:
        InputError: an adapter without a base, or one that does not fit it; see ``open_checkpoint``.
    """
    if not is_adapter(path):
        return _with_scales(without_wrappers(open_checkpoint(path, subtree, config)))
    if base is None:
        rule = f"{path}: is an adapter and needs the model it was trained on"
        raise OptionError(rule, "base", "give {}")
    return put_on_named_base(read_adapter(path), base)


def _with_scales(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with 8-bit tensors joined to their scales, and without the scales."""
    small = [entry for entry in checkpoint.tensors.values() if entry.dtype in FP8_DTYPES]
    if not small:
        return checkpoint
    block = _block_size(checkpoint.path)
    tensors = dict(checkpoint.tensors)
    used: set[str] = set()
    for entry in small:
        names = [
            entry.name + suffix for suffix in _SCALE_SUFFIXES if entry.name + suffix in tensors
        ]
        scales = _scales(entry, checkpoint.tensors[names[0]], block) if names else None
        used.update(names)
        layer = entry.name.rpartition(".")[0]
        used.update(f"{layer}.{name}" for name in _LAYER_SCALES if f"{layer}.{name}" in tensors)
        tensors[entry.name] = DecodedEntry(**_fields(entry), scales=scales)
    tensors = {name: entry for name, entry in tensors.items() if name not in used}
    shards = tuple(
        (file, tuple(name for name in names if name in tensors))
        for file, names in checkpoint.shards
    )
    return replace(checkpoint, tensors=tensors, shards=tuple(shard for shard in shards if shard[1]))


def _scales(entry: TensorEntry, scale: TensorEntry, block: tuple[int, int] | None) -> Scales:
    if scale.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"{scale.file}: {scale.name}: a scale must be of a float dtype, got {scale.dtype}"
        )
    cols = entry.shape[-1] if entry.shape else 1
    rows = math.prod(entry.shape[:-1])
    shape = scale.shape if len(scale.shape) == 2 else (scale.num_elements, 1)
    if scale.num_elements == 1:
        return Scales(scale, max(rows, 1), max(cols, 1))
    if shape == (rows, 1):
        return Scales(scale, 1, max(cols, 1))
    size = block or (_even(rows, shape[0]), _even(cols, shape[1]))
    if not all(size) or (-(-rows // size[0]), -(-cols // size[1])) != shape:
        raise InputError(
            f"{scale.file}: {scale.name}: must have one scale, one per row or one per block of "
            f"{entry.name} "
            f"{list(entry.shape)}, got {list(scale.shape)}"
        )
    return Scales(scale, *size)


def _even(size: int, parts: int) -> int:
    return size // parts if parts and size % parts == 0 else 0


def _block_size(path: Location) -> tuple[int, int] | None:
    """quantization_config.weight_block_size of config.json; None without it."""
    file = folder_of(path) / "config.json"
    config = read_json(file).get("quantization_config") if file.exists() else None
    size = config.get("weight_block_size") if isinstance(config, dict) else None
    if size is None:
        return None
    if not (
        isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    ):
        raise InputError(
            f"{file}: weight_block_size: must be two positive integers, got {quote(size)}"
        )
    return size[0], size[1]


def _fields(entry: TensorEntry) -> dict[str, Any]:
    return {field.name: getattr(entry, field.name) for field in fields(TensorEntry)}
