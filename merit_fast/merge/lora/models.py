"""A base and its fine-tune in the names that their parameters have in memory, which are PEFT's."""

from collections.abc import Mapping
from typing import Any

from merit_fast.errors import InputError
from merit_fast.merge.read.adapters.tied import (
    embedding_of,
    has_tied_head,
    head_name,
    is_head,
    same_values,
)
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.companions import CONFIG_FILE
from merit_fast.merge.read.decoded import read_input
from merit_fast.merge.read.entries import TensorEntry, is_float
from merit_fast.merge.read.files import read_json
from merit_fast.merge.read.names.matching import match_names
from merit_fast.merge.read.names.modules import module_names
from merit_fast.merge.read.remote import Location
from merit_fast.records import record


@record
class Pair:
    """Two models' float tensors by name in memory: (the base's, the fine-tune's)."""

    tensors: Mapping[str, tuple[TensorEntry, TensorEntry]]
    config: Mapping[str, Any]  # the base's config.json
    embedding: str | None  # the only input embedding
    tied_head: str | None  # the head that is the embedding in both models

    @property
    def base_tensors(self) -> dict[str, TensorEntry]:
        return {name: before for name, (before, _) in self.tensors.items()}

    @property
    def tuned_tensors(self) -> dict[str, TensorEntry]:
        return {name: after for name, (_, after) in self.tensors.items()}

    @property
    def model_type(self) -> str:
        text = self.config.get("text_config")
        nested = text.get("model_type") if isinstance(text, dict) else None
        return str(nested or self.config.get("model_type") or "")


def read_pair(base: Location, model: Location) -> Pair:
    """Reads both models' headers and matches their tensors.

    Raises:
        InputError: a tensor is in one of them only, has two shapes, or is no float and may differ.
    """
    start = read_input(base, None)
    tuned = match_names(start, [read_input(model, start)])[0]
    file = base / CONFIG_FILE
    config = read_json(file) if file.exists() else {}
    before = dict(module_names(start).tensors)
    after = dict(module_names(tuned, start).tensors)
    embedding = _embedding(start, before)
    head = head_name(embedding) if embedding and has_tied_head(start) else None
    own_head = next((name for name in after if is_head(name) and name not in before), None)
    if own_head and head and embedding:
        before[own_head] = before[embedding]
        head = None
    for name in (*before, *after):
        if name not in after or name not in before:
            lacking, having = (model, base) if name not in after else (base, model)
            raise InputError(f"{lacking}: {name}: is missing, {having} has it")
    tensors = {}
    for name, entry in before.items():
        other = after[name]
        if entry.shape != other.shape:
            raise InputError(
                f"{other.file}: {name}: shape must be {list(entry.shape)} as in {entry.file}, "
                f"got {list(other.shape)}"
            )
        if is_float(entry) and is_float(other):
            tensors[name] = (entry, other)
        elif not same_values(entry, other):
            raise InputError(f"{other.file}: {name}: is no float tensor and must be as in {base}")
    return Pair(tensors, config, embedding, head)


def _embedding(start: Checkpoint, tensors: Mapping[str, TensorEntry]) -> str | None:
    """The name in memory of the model's only input embedding; None where it has none or several."""
    try:
        return embedding_of(Checkpoint(start.path, tensors, ()))
    except InputError:
        return None
