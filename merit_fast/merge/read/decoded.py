"""Inputs decoded while they are read: 8-bit floats with scales, adapters on a base."""

from dataclasses import fields, replace
from typing import Any

from merit_fast.errors import InputError
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.adapter import ADAPTER_CONFIG, Adapter, check_tied, read_adapter
from merit_fast.merge.read.checkpoint import Checkpoint, read_checkpoint
from merit_fast.merge.read.entries import (
    ChangedEntry,
    LowRank,
    TensorEntry,
    is_float,
)
from merit_fast.merge.read.quantised.join import join_scales
from merit_fast.merge.read.remote import Location


def is_adapter(path: Location) -> bool:
    return (path / ADAPTER_CONFIG).exists() and not (path / "config.json").exists()


def read_input(path: Location, base: Checkpoint | None, unscaled_fp8: bool = False) -> Checkpoint:
    """One model to merge: a checkpoint, quantised or not, or a LoRA adapter on the base.

    Raises:
        InputError: an adapter without a base, or one that does not fit it; see
            ``read_checkpoint`` and ``join_scales``.
    """
    if not is_adapter(path):
        return join_scales(read_checkpoint(path), unscaled_fp8)
    if base is None:
        rule = f"{path}: is an adapter and needs the model it was trained on"
        raise OptionError(rule, "base", "give {}")
    adapter = read_adapter(path)
    check_tied(adapter, base)
    return _on_base(adapter, base)


def _on_base(adapter: Adapter, base: Checkpoint) -> Checkpoint:
    """The base with the adapter's changes, as a checkpoint of decoded tensors."""
    tensors = dict(base.tensors)
    for name, entry in adapter.full.items():
        target = tensors.get(name)
        if target is None or target.shape != entry.shape:
            shape = "no such tensor" if target is None else str(list(target.shape))
            raise InputError(
                f"{entry.file}: {entry.name}: must have the shape of {name} in {base.path}, {shape}"
            )
        tensors[name] = replace(entry, name=name)
    for name, change in adapter.low_rank.items():
        target = tensors.get(name)
        if target is None or target.shape != change.shape or not is_float(target):
            shape = "no such tensor" if target is None else f"{target.dtype} {list(target.shape)}"
            raise InputError(
                f"{change.a.file}: {change.a.name}: changes {name} as a float tensor of "
                f"{list(change.shape)}, "
                f"{base.path} has {shape}"
            )
        tensors[name] = _changed(target, change)
    return Checkpoint(adapter.path, tensors, base.shards)


def _changed(entry: TensorEntry, change: LowRank) -> ChangedEntry:
    return ChangedEntry(**_fields(entry), source=entry, changes=(change,))


def _fields(entry: TensorEntry) -> dict[str, Any]:
    return {field.name: getattr(entry, field.name) for field in fields(TensorEntry)}
