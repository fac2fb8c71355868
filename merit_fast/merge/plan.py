"""Which bytes go where: output shards laid out like the first input, tensors coalesced into long segments. No data."""

import bisect
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merit_fast.errors import InputError
from merit_fast.kernels.average import FLOAT_DTYPES
from merit_fast.merge.checkpoint import INDEX_FILE, ITEM_BYTES, SINGLE_FILE, Checkpoint, TensorEntry


@dataclass(frozen=True)
class Segment:
    """A run of elements that is contiguous in every input and in the output. Offsets in bytes."""

    names: tuple[str, ...]
    ends: tuple[int, ...]  # where each tensor ends, in elements from the segment's start
    dtype: str  # of the output
    output_offset: int
    inputs: tuple[TensorEntry, ...]  # of the first tensor, one per input; all tensors of an input have its dtype
    coefficients: tuple[float, ...] = ()  # of the first inputs

    @property
    def num_elements(self) -> int:
        return self.ends[-1]

    def name_at(self, element: int) -> str:
        """The tensor that holds an element of the segment."""
        return self.names[bisect.bisect_right(self.ends, element)]


@dataclass(frozen=True)
class Shard:
    """One output file: its header, its size, its averaged segments and the tensors that are copied as they are."""

    file: str
    header: bytes
    num_bytes: int
    segments: tuple[Segment, ...]
    copies: tuple[Segment, ...]  # integer tensors, equal in all inputs


@dataclass(frozen=True)
class Plan:
    inputs: tuple[Path, ...]
    shards: tuple[Shard, ...]
    index: str | None  # text of the index, None for a single file

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def num_elements(self) -> int:
        return sum(s.num_elements for shard in self.shards for s in shard.segments)


def plan_merge(
    checkpoints: Sequence[Checkpoint],
    dtype: str | None = None,
    coefficients: Callable[[str], tuple[float, ...]] = lambda name: (),
) -> Plan:
    """Checks that all inputs hold the same tensors and lays out the output.

    Args:
        checkpoints: the inputs; the output's shards are those of the first.
        dtype: of the output's float tensors ("BF16", "F16", "F32"). None: the inputs', which must then agree.
        coefficients: tensor name -> its inputs' coefficients (those of the first inputs; the others are read only).

    Raises:
        InputError: a tensor is missing, extra, of another shape or dtype; names file, tensor, rule and values.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        _check_same(first, other, dtype is not None)
    shards = tuple(_plan_shard(file, names, checkpoints, dtype, coefficients) for file, names in first.shards)
    index = None
    if [shard.file for shard in shards] != [SINGLE_FILE]:
        total = sum(shard.num_bytes - len(shard.header) for shard in shards)
        parameters = sum(entry.num_elements for entry in first.tensors.values())
        weight_map = {name: file for file, names in first.shards for name in names}
        metadata = {"total_parameters": parameters, "total_size": total}
        index = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    return Plan(tuple(c.path for c in checkpoints), shards, index)


def _check_same(first: Checkpoint, other: Checkpoint, floats_may_differ: bool) -> None:
    where = other.path / INDEX_FILE if (other.path / INDEX_FILE).exists() else other.path / SINGLE_FILE
    for name, entry in first.tensors.items():
        if name not in other.tensors:
            raise InputError(f"{where}: {name}: is missing, {first.path} has it")
        found = other.tensors[name]
        for rule, mine, theirs in (("shape", entry.shape, found.shape), ("dtype", entry.dtype, found.dtype)):
            both_float = entry.dtype in FLOAT_DTYPES and found.dtype in FLOAT_DTYPES
            if mine != theirs and not (rule == "dtype" and floats_may_differ and both_float):
                hint = "; merge.dtype chooses one" if rule == "dtype" and both_float else ""
                raise InputError(
                    f"{found.file}: {name}: {rule} must be {_text(mine)} as in {entry.file}, got {_text(theirs)}{hint}"
                )
    for name, entry in other.tensors.items():
        if name not in first.tensors:
            raise InputError(f"{entry.file}: {name}: is not in {first.path}")


def _plan_shard(
    file: str,
    names: Sequence[str],
    checkpoints: Sequence[Checkpoint],
    dtype: str | None,
    coefficients: Callable[[str], tuple[float, ...]],
) -> Shard:
    entries = [checkpoints[0].tensors[name] for name in names]
    dtypes = [dtype if dtype and entry.dtype in FLOAT_DTYPES else entry.dtype for entry in entries]
    sizes = [entry.num_elements * ITEM_BYTES[out] for entry, out in zip(entries, dtypes, strict=True)]
    offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for i, entry in enumerate(entries):
        data_offsets = [offsets[i], offsets[i + 1]]
        header[entry.name] = {"dtype": dtypes[i], "shape": list(entry.shape), "data_offsets": data_offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    segments: list[Segment] = []
    copies: list[Segment] = []
    for i, entry in enumerate(entries):
        inputs = tuple(checkpoint.tensors[entry.name] for checkpoint in checkpoints)
        segment = Segment((entry.name,), (entry.num_elements,), dtypes[i], start + offsets[i], inputs)
        if entry.num_elements and entry.dtype in FLOAT_DTYPES:
            segments.append(replace(segment, coefficients=coefficients(entry.name)))
        elif entry.num_elements:
            copies.append(segment)
    prefix = struct.pack("<Q", len(text)) + text
    return Shard(file, prefix, start + offsets[-1], tuple(_coalesce(segments)), tuple(copies))


def _coalesce(segments: Sequence[Segment]) -> list[Segment]:
    """Joins neighbours that follow each other without a gap in the output and in every input."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last is not None and last.dtype == segment.dtype and _follows(last, segment):
            joined[-1] = Segment(
                last.names + segment.names,
                (*last.ends, last.num_elements + segment.num_elements),
                last.dtype,
                last.output_offset,
                last.inputs,
                last.coefficients,
            )
        else:
            joined.append(segment)
    return joined


def _follows(last: Segment, segment: Segment) -> bool:
    elements = last.num_elements
    if last.coefficients != segment.coefficients:
        return False
    return last.output_offset + elements * ITEM_BYTES[last.dtype] == segment.output_offset and all(
        mine.file == theirs.file
        and mine.dtype == theirs.dtype
        and mine.offset + elements * ITEM_BYTES[mine.dtype] == theirs.offset
        for mine, theirs in zip(last.inputs, segment.inputs, strict=True)
    )


def _text(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
