"""The safetensors variant of a distributed checkpoint: each rank's file holds its chunks.

A file's metadata maps its tensors to the place of the chunk: ``DCP_SHARDING_INFO`` is the JSON text
{name: {"saved_offsets": [...]}}. The whole shape follows from the chunks, which must tile it.
"""

import json
import struct
from collections.abc import Sequence
from typing import Any

from merit_fast.errors import InputError
from merit_fast.merge.read.boxes import row_major
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.dcp.files import output_files
from merit_fast.merge.read.dcp.tiles import tiling_fault
from merit_fast.merge.read.entries import AssembledEntry, Part, TensorEntry
from merit_fast.merge.read.files import open_regular, parse_json, quote
from merit_fast.merge.read.headers import MAX_HEADER_BYTES, read_header
from merit_fast.merge.read.remote import Location

_KEY = "DCP_SHARDING_INFO"
_MAX_NUMBER = 2**63 - 1

Chunk = tuple[tuple[int, ...], TensorEntry]  # offsets and values


def sharded_files(path: Location, present: Sequence[str]) -> list[str]:
    """The files of a directory that hold chunks; [] if the first safetensors file holds none."""
    files = [name for name in present if name.endswith(".safetensors")]
    return files if files and _sharding(path / files[0]) is not None else []


def read_sharded(path: Location, files: Sequence[str]) -> Checkpoint:
    """The tensors of a directory of such files.

    Raises:
        InputError: a file has no place for a tensor; chunks overlap, leave a hole or differ in
            dtype; see ``read_header``.
    """
    chunks: dict[str, list[Chunk]] = {}
    for name in files:
        file = path / name
        places = _sharding(file)
        if places is None:
            raise InputError(f"{file}: has no {_KEY}, {path / files[0]} has it")
        for entry in read_header(file):
            offsets = _offsets(file, entry, places.get(entry.name))
            chunks.setdefault(entry.name, []).append((offsets, entry))
    tensors = {name: _joined(each) for name, each in chunks.items()}
    return Checkpoint(path, tensors, output_files(tensors.values()))


def _joined(chunks: Sequence[Chunk]) -> TensorEntry:
    first = chunks[0][1]
    for _, entry in chunks[1:]:
        if entry.dtype != first.dtype or len(entry.shape) != len(first.shape):
            raise InputError(
                f"{entry.file}: {entry.name}: must be {first.dtype} of {len(first.shape)} "
                f"dimensions as in {first.file}, got {entry.dtype} {list(entry.shape)}"
            )
    shape = tuple(
        max(offsets[d] + entry.shape[d] for offsets, entry in chunks)
        for d in range(len(first.shape))
    )
    fault = tiling_fault(shape, [(offsets, entry.shape) for offsets, entry in chunks])
    if fault:
        raise InputError(f"{first.file}: {first.name}: {fault}")
    filled = [chunk for chunk in chunks if 0 not in chunk[1].shape]
    if len(filled) <= 1:
        return filled[0][1] if filled else first
    parts = tuple(
        Part(entry, offsets, entry.shape, 0, row_major(entry.shape)) for offsets, entry in filled
    )
    num_bytes = sum(entry.num_bytes for _, entry in filled)
    start = filled[0][1]
    return AssembledEntry(
        first.name, first.dtype, shape, start.file, start.offset, num_bytes, parts
    )


def _sharding(file: Location) -> dict[str, Any] | None:
    """Name -> place of a file's chunks; None where it does not say."""
    with open_regular(file) as opened:
        prefix = opened.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        text = opened.read(length) if length <= MAX_HEADER_BYTES else b""
    if _KEY.encode() not in text:
        return None
    header = parse_json(text, f"{file}: header")
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    places = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(places, str):
        return None
    values = parse_json(places.encode(), f"{file}: {_KEY}")
    if not isinstance(values, dict):
        raise InputError(f"{file}: {_KEY}: must be a JSON object, got {quote(values)}")
    return values


def _offsets(file: Location, entry: TensorEntry, place: Any) -> tuple[int, ...]:
    offsets = place.get("saved_offsets") if isinstance(place, dict) else None
    numbers = isinstance(offsets, list) and all(
        type(number) is int and 0 <= number <= _MAX_NUMBER for number in offsets
    )
    if offsets is None or not numbers or len(offsets) != len(entry.shape):
        raise InputError(
            f"{file}: {entry.name}: {_KEY} must have saved_offsets of {len(entry.shape)} "
            f"integers, got {quote(json.dumps(place)[:200])}"
        )
    return tuple(offsets)
