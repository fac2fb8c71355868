"""Models made of layers of others: every slice takes a range of layers from each model, the output stacks the slices.

Layers are numbered anew from 0. What belongs to no layer comes from the first slice if it stands before the layers, and
from the last if after. Names tell: before stand embeddings and what belongs to them (a part of the name holds "emb", or
is wte, wpe, shared or relative_pe), after them all else: the final norm, the head (lm_head, embed_out, ...).
"""

import bisect
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.manifests.atomic import write_text
from merit_fast.merge.parameters import Layers, layer_of
from merit_fast.merge.read.checkpoint import SINGLE_FILE, Checkpoint, TensorEntry
from merit_fast.merge.read.companions import CONFIG_FILE
from merit_fast.merge.read.files import list_directory, read_json
from merit_fast.merge.read.remote import Location

_BEFORE = ("wte", "wpe", "shared", "relative_pe")
_DEPTH_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


@dataclass(frozen=True)
class Source:
    """Layers ``first`` to ``end`` - 1 of one model."""

    path: Location
    first: int
    end: int


@dataclass(frozen=True)
class Slice:
    """One range of as many layers from each model of the merge, in its order, and from the base where it has one."""

    sources: tuple[Source, ...]
    base: Source | None = None

    @property
    def depth(self) -> int:
        return self.sources[0].end - self.sources[0].first


class StackedLayers(Layers):
    """Where the tensors of a stack stand: positions run from 0 to 1 in every slice."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        self.slices = tuple(slices)
        self.ends = list(itertools.accumulate(part.depth for part in slices))

    def slice_of(self, name: str) -> int:
        number = layer_of(name)
        if number is None:
            return 0 if stands_before(name) else len(self.slices) - 1
        return bisect.bisect_right(self.ends, number)

    def position(self, name: str) -> float:
        depth = self.slices[self.slice_of(name)].depth
        if layer_of(name) is None:
            return 0.0
        return self._within(name) / (depth - 1) if depth > 1 else 1.0

    def name_in(self, model: int, name: str) -> str:
        if layer_of(name) is None:
            return name
        return _renumbered(
            name, self.slices[self.slice_of(name)].sources[model].first + self._within(name)
        )

    def _within(self, name: str) -> int:
        """The layer's number in its slice."""
        place = self.slice_of(name)
        return (layer_of(name) or 0) - (self.ends[place - 1] if place else 0)


def stands_before(name: str) -> bool:
    """Whether a tensor of no layer stands before the layers."""
    parts = name.split(".")
    return any(part in _BEFORE or ("emb" in part and part != "embed_out") for part in parts)


def stack_layers(
    slices: Sequence[Slice], read: Mapping[Location, Checkpoint]
) -> tuple[list[Checkpoint], Checkpoint | None, StackedLayers]:
    """The inputs of a merge of slices: for every place in them a checkpoint under the output's names.

    Args:
        slices: all with as many sources, of equal depth within a slice.
        read: the checkpoints of all sources by path.

    Returns:
        one checkpoint for each place among the sources, the one of the bases, where the tensors stand.

    Raises:
        InputError: a range ends after the model's last layer; layers of more than one kind (as in a vision tower).
    """
    for checkpoint in read.values():
        _check_prefixes(checkpoint)
    depths = {path: Layers(checkpoint.tensors).count for path, checkpoint in read.items()}
    for number, part in enumerate(slices):
        for source in (*part.sources, *([part.base] if part.base else [])):
            if source.end > depths[source.path]:
                raise InputError(
                    f"{source.path}: slices[{number}]: layer_range must end at {depths[source.path]}, the number of "
                    f"layers, or before, got {source.end}"
                )
    columns = [
        _stacked([part.sources[k] for part in slices], read) for k in range(len(slices[0].sources))
    ]
    bases = [part.base for part in slices if part.base]
    return columns, _stacked(bases, read) if bases else None, StackedLayers(slices)


def write_depth(directory: Path, slices: Sequence[Slice]) -> None:
    """Gives config.json of an output the number of its layers, and lists of one entry per layer those of its layers.

    A list per layer is one of as many entries as the model had layers, with "layer" or "block" in its key.
    """
    file = directory / CONFIG_FILE
    if not file.exists():
        return
    values = read_json(file)
    for place in ("", "text_config"):
        part = values.get(place) if place else values
        if isinstance(part, dict):
            _set_depth(part, place, slices)
    write_text(file, json.dumps(values, indent=2) + "\n")


def describe_slices(slices: Sequence[Slice]) -> str:
    """All that decides what is stacked, for the fingerprint of the output."""
    rows = [[*part.sources, *([part.base] if part.base else [])] for part in slices]
    return "; ".join(" + ".join(f"{s.path}[{s.first}:{s.end}]" for s in row) for row in rows)


def _stacked(column: Sequence[Source], read: Mapping[Location, Checkpoint]) -> Checkpoint:
    tensors: dict[str, TensorEntry] = {}
    start, last = 0, len(column) - 1
    for number, source in enumerate(column):
        checkpoint = read[source.path]
        for name in (name for _, names in checkpoint.shards for name in names):
            layer = layer_of(name)
            if layer is not None and source.first <= layer < source.end:
                tensors[_renumbered(name, start + layer - source.first)] = checkpoint.tensors[name]
            elif layer is None and number == (0 if stands_before(name) else last):
                tensors[name] = checkpoint.tensors[name]
        start += source.end - source.first
    return Checkpoint(column[0].path, tensors, ((SINGLE_FILE, tuple(tensors)),))


def _check_prefixes(checkpoint: Checkpoint) -> None:
    prefixes = sorted(
        {name[: found.start()] for name in checkpoint.tensors if (found := _number(name))}
    )
    if len(prefixes) != 1:
        raise InputError(
            f"{checkpoint.path}: slices need layers of one kind, got {', '.join(prefixes) or 'no numbered layer'}"
        )


def _set_depth(part: dict[str, Any], place: str, slices: Sequence[Slice]) -> None:
    old = next((part[key] for key in _DEPTH_KEYS if isinstance(part.get(key), int)), None)
    if old is None:
        return
    for key in _DEPTH_KEYS:
        if part.get(key) == old:
            part[key] = sum(one.depth for one in slices)
    for key, value in part.items():
        if isinstance(value, list) and len(value) == old and ("layer" in key or "block" in key):
            part[key] = [
                entry for one in slices for entry in _entries(one.sources[0], place, key, value)
            ]


def _entries(source: Source, place: str, key: str, value: list[Any]) -> list[Any]:
    """Of a list per layer those of the source's layers: by its own config, or the output's where it has none."""
    file = source.path / CONFIG_FILE
    values = read_json(file) if CONFIG_FILE in list_directory(source.path) else {}
    own = (values.get(place) or {}).get(key) if place else values.get(key)
    found = own if isinstance(own, list) else value
    if len(found) < source.end:
        raise InputError(
            f"{file}: {key}: must have {source.end} entries, one per layer, got {len(found)}"
        )
    return found[source.first : source.end]


def _number(name: str) -> re.Match[str] | None:
    return re.search(r"\.(\d{1,9})\.", name)


def _renumbered(name: str, number: int) -> str:
    found = _number(name)
    assert found is not None
    return f"{name[: found.start(1)]}{number}{name[found.end(1) :]}"
