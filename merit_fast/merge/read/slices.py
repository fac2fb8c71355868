"""Stacks of layers: every slice takes a range of layers from each model, the output stacks slices.

Layers are numbered from 0 again. A tensor outside the layers comes from the first slice if it
stands before them, and from the last if after. Names tell: before stand embeddings (a component of
the name holds "emb", or is wte, wpe, shared or relative_pe), after stand the final norm and the
head.
"""

import bisect
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.manifests.atomic import write_text
from merit_fast.merge.parameters import Layers, layer_of
from merit_fast.merge.read.checkpoint import SINGLE_FILE, Checkpoint
from merit_fast.merge.read.companions import CONFIG_FILE
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.read.files import list_directory, read_json
from merit_fast.merge.read.remote import Location
from merit_fast.records import record

_BEFORE = ("wte", "wpe", "shared", "relative_pe")
_DEPTH_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


@record
class Source:
    """Layers ``first`` to ``end`` - 1 of one model."""

    path: Location
    first: int
    end: int


@record
class Slice:
    """Ranges of equal depth: one per model, in the merge's order, and one of the base, if any."""

    sources: tuple[Source, ...]
    base: Source | None = None

    @property
    def depth(self) -> int:
        return self.sources[0].end - self.sources[0].first


class StackedLayers(Layers):
    """Layers of a stack: positions run from 0 to 1 in every slice."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        self.slices = tuple(slices)
        self.ends = list(itertools.accumulate(each.depth for each in slices))

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
        number = self.slice_of(name)
        return (layer_of(name) or 0) - (self.ends[number - 1] if number else 0)


def stands_before(name: str) -> bool:
    """Whether a tensor of no layer stands before the layers."""
    words = name.split(".")
    return any(word in _BEFORE or ("emb" in word and word != "embed_out") for word in words)


def stack_layers(
    slices: Sequence[Slice], read: Mapping[Location, Checkpoint]
) -> tuple[list[Checkpoint], Checkpoint | None, StackedLayers]:
    """Stacked checkpoints of a merge of slices, one per source, under the output's names.

    Args:
        slices: all with as many sources, of equal depth within a slice.
        read: the checkpoints of all sources by path.

    Returns:
        a checkpoint for each source of a slice, the one of the bases, the stack's layers.

    Raises:
        InputError: a range ends after the model's last layer; layers of more than one kind (as in a
            vision tower).
    """
    for checkpoint in read.values():
        _check_prefixes(checkpoint)
    depths = {path: Layers(checkpoint.tensors).count for path, checkpoint in read.items()}
    for number, each in enumerate(slices):
        for source in _sources(each):
            if source.end > depths[source.path]:
                raise InputError(
                    f"{source.path}: slices[{number}]: layer_range must end at "
                    f"{depths[source.path]}, the number of "
                    f"layers, or before, got {source.end}"
                )
    columns = [
        _stacked([each.sources[k] for each in slices], read) for k in range(len(slices[0].sources))
    ]
    bases = [each.base for each in slices if each.base]
    return columns, _stacked(bases, read) if bases else None, StackedLayers(slices)


def write_depth(directory: Path, slices: Sequence[Slice]) -> None:
    """Sets the number of layers in an output's config.json, and the entries of its lists per layer.

    A list per layer is one of as many entries as the model had layers, with "layer" or "block" in
    its key.
    """
    file = directory / CONFIG_FILE
    if not file.exists():
        return
    values = read_json(file)
    for key in ("", "text_config"):
        config = values.get(key) if key else values
        if isinstance(config, dict):
            _set_depth(config, key, slices)
    write_text(file, json.dumps(values, indent=2) + "\n")


def describe_slices(slices: Sequence[Slice]) -> str:
    """Text that names every layer of a stack, for the fingerprint of the output."""
    rows = [_sources(each) for each in slices]
    return "; ".join(" + ".join(f"{s.path}[{s.first}:{s.end}]" for s in row) for row in rows)


def _sources(each: Slice) -> list[Source]:
    return [*each.sources, *([each.base] if each.base else [])]


def _stacked(column: Sequence[Source], read: Mapping[Location, Checkpoint]) -> Checkpoint:
    tensors: dict[str, TensorEntry] = {}
    start = 0
    last = len(column) - 1
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
    matches = ((name, _number(name)) for name in checkpoint.tensors)
    prefixes = sorted({name[: match.start()] for name, match in matches if match})
    if len(prefixes) != 1:
        raise InputError(
            f"{checkpoint.path}: slices need layers of one kind, got "
            f"{', '.join(prefixes) or 'no numbered layer'}"
        )


def _set_depth(config: dict[str, Any], section: str, slices: Sequence[Slice]) -> None:
    depths = (config[key] for key in _DEPTH_KEYS if isinstance(config.get(key), int))
    old = next(depths, None)
    if old is None:
        return
    for key in _DEPTH_KEYS:
        if config.get(key) == old:
            config[key] = sum(each.depth for each in slices)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == old and ("layer" in key or "block" in key):
            sources = (each.sources[0] for each in slices)
            config[key] = [
                entry for source in sources for entry in _entries(source, section, key, value)
            ]


def _entries(source: Source, section: str, key: str, value: list[Any]) -> list[Any]:
    """The source's layers' entries of a list per layer: its config's, or else the output's."""
    file = source.path / CONFIG_FILE
    values = read_json(file) if CONFIG_FILE in list_directory(source.path) else {}
    listed = (values.get(section) or {}).get(key) if section else values.get(key)
    entries = listed if isinstance(listed, list) else value
    if len(entries) < source.end:
        raise InputError(
            f"{file}: {key}: must have {source.end} entries, one per layer, got {len(entries)}"
        )
    return entries[source.first : source.end]


def _number(name: str) -> re.Match[str] | None:
    return re.search(r"\.(\d{1,9})\.", name)


def _renumbered(name: str, number: int) -> str:
    match = _number(name)
    assert match is not None
    return f"{name[: match.start(1)]}{number}{name[match.end(1) :]}"
