"""Writes a divided model as transformers does, one tensor at a time."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merit_fast.manifests.atomic import write_text
from merit_fast.train.parallel.files import write_tensors
from merit_fast.train.parallel.ranks import Ranks

_INDEX = "model.safetensors.index.json"
_METADATA = {"format": "pt"}


def write_model(model: Any, directory: Path, max_shard_size: str, ranks: Ranks) -> None:
    """Writes the files of ``save_pretrained`` from every process's rows; the leader writes.

    Args:
        model: a divided language model, between two calls of it.
        directory: the branch's folder.
        max_shard_size: largest weight file, as ``save_pretrained`` reads it.
        ranks: the processes; each calls this function.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = _saved_tensors(model)
    sizes = {
        name: torch.empty(tensors[name].shape, dtype=tensors[name].dtype, device="meta")
        for name in sorted(tensors, key=_numbers_by_size)
    }
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    if ranks.leads:
        _write_configs(model, directory)
    for file, names in plan.filename_to_tensors.items():
        chosen = {name: tensors[name] for name in names}
        write_tensors(directory / file, chosen, _METADATA, ranks)
    if plan.is_sharded and ranks.leads:
        metadata = {"total_parameters": model.num_parameters(), **plan.metadata}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        write_text(directory / _INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _saved_tensors(model: Any) -> dict[str, Tensor]:
    """Tensors by name; a tied one under the name that transformers keeps."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = {*(model._keys_to_ignore_on_save or [])}
    kept: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        before = kept.get(id(tensor))
        if name not in ignored and (before is None or before in tied):
            kept[id(tensor)] = name
    return {name: tensors[name].detach() for name in kept.values()}


def _numbers_by_size(name: str) -> list[tuple[int, str, int]]:
    """A key that sorts layer 2 before layer 10, as transformers does."""
    key: list[tuple[int, str, int]] = []
    for part in name.split("."):
        word = part.rstrip("0123456789")
        digits = part[len(word) :]
        key.append((int(bool(word)), word, int(digits) if digits else -1))
    return key


def _write_configs(model: Any, directory: Path) -> None:
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
