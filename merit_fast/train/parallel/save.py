"""Writes a divided model as transformers does, one tensor at a time."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from merit_fast.manifests.atomic import write_text
from merit_fast.train.parallel.files import write_tensors
from merit_fast.train.parallel.ranks import Ranks
from merit_fast.train.parallel.stored import plan_files, stored_runs

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
    tensors = _saved_tensors(model)
    runs = stored_runs(model, tensors)
    plan = plan_files(model, tensors, max_shard_size)
    if ranks.leads:
        _write_configs(model, directory)
    for file, names in plan.filename_to_tensors.items():
        chosen = {name: tensors[runs[name].name] for name in names}
        parts = {name: runs[name] for name in names if runs[name].shape != chosen[name].shape}
        write_tensors(directory / file, chosen, _METADATA, ranks, parts)
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


def _write_configs(model: Any, directory: Path) -> None:
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
