"""Sharded safetensors from headers alone: names, dtypes, shapes and byte ranges, all checked before any data is read.

File: u64 little-endian header length, JSON header, data; offsets count from the end of the header, without holes.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. ``offset`` counts bytes from the start of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return self.num_bytes // ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """A model directory: its tensors, and which file of it holds which, in file order."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    shards: tuple[tuple[str, tuple[str, ...]], ...]  # (file name, tensor names by offset)


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the headers of a directory of safetensors files, by its index if it has one.

    Raises:
        InputError: a rule of the format is broken; the message names file, tensor, rule and value.
    """
    if not path.is_dir():
        raise InputError(f"{path}: is not a directory")
    index = path / INDEX_FILE
    if index.exists():
        weight_map = _read_weight_map(index)
        files = sorted(set(weight_map.values()))
    elif (path / SINGLE_FILE).exists():
        weight_map, files = None, [SINGLE_FILE]
    else:
        pickles = sorted(file.name for file in path.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle file, convert it to safetensors first" if pickles else ""
        raise InputError(f"{path}: holds neither {INDEX_FILE} nor {SINGLE_FILE}{hint}")
    tensors: dict[str, TensorEntry] = {}
    shards = []
    for name in files:
        entries = read_header(path / name)
        for entry in entries:
            if entry.name in tensors:
                raise InputError(f"{path / name}: {entry.name}: is in {tensors[entry.name].file.name} too")
            tensors[entry.name] = entry
        shards.append((name, tuple(entry.name for entry in entries)))
    if weight_map is not None:
        _check_index(index, weight_map, tensors)
    return Checkpoint(path, tensors, tuple(shards))


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file, by offset."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            prefix = opened.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if length < 2 or length > min(MAX_HEADER_BYTES, size - 8):
                raise InputError(
                    f"{file}: header length must be between 2 and {min(MAX_HEADER_BYTES, size - 8)}, got {length}"
                )
            header = json.loads(opened.read(length), object_pairs_hook=_no_repeats(file))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise InputError(f"{file}: header is not JSON") from None
    if not isinstance(header, dict):
        raise InputError(f"{file}: header must be a JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    entries = sorted(
        (_entry(file, name, value, start) for name, value in header.items()), key=lambda e: (e.offset, e.num_bytes)
    )
    end = start
    for entry in entries:
        if entry.offset != end:
            raise InputError(f"{file}: {entry.name}: data must start at byte {end - start}, got {entry.offset - start}")
        end += entry.num_bytes
    if end != size:
        raise InputError(f"{file}: holds {size} bytes, its header describes {end}")
    return entries


def _entry(file: Path, name: str, value: Any, start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        integers = all(type(number) is int and number >= 0 for number in (*shape, begin, stop))
    except (TypeError, KeyError, ValueError):
        integers = False
    if not integers:
        raise InputError(f"{file}: {name}: needs dtype, shape and data_offsets, got {json.dumps(value)[:80]}")
    if dtype not in ITEM_BYTES:
        raise InputError(f"{file}: {name}: dtype must be one of {', '.join(ITEM_BYTES)}, got {str(dtype)[:20]}")
    elements = 1
    for size in shape:
        elements *= size
    if stop - begin != elements * ITEM_BYTES[dtype]:
        raise InputError(
            f"{file}: {name}: {dtype} {list(shape)} must span {elements * ITEM_BYTES[dtype]} bytes, got {stop - begin}"
        )
    return TensorEntry(name, dtype, shape, file, start + begin, stop - begin)


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{index}: must be JSON with a weight_map") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map: must be a mapping of tensor to file, got {str(weight_map)[:60]}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: {tensor}: must name a .safetensors file of this directory, got {str(name)[:80]}"
            )
    return weight_map


def _check_index(index: Path, weight_map: dict[str, str], tensors: dict[str, TensorEntry]) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise InputError(f"{index}: {name}: is not in {file}")
        if tensors[name].file.name != file:
            raise InputError(f"{index}: {name}: must be in {file}, is in {tensors[name].file.name}")
    for name, entry in tensors.items():
        if name not in weight_map:
            raise InputError(f"{index}: {name}: is in {entry.file.name} but not in the index")


def _no_repeats(file: Path) -> Any:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{file}: {repeated}: stands twice in the header")
        return seen

    return build
