"""Sharded safetensors, read from headers only: names, dtypes, shapes and byte ranges, all checked.

File: u64 little-endian header length, JSON header, data; offsets count from the end of the header,
without holes. No name in an index leads out of its directory.
"""

import math
import shlex
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.read.files import (
    MAX_JSON_BYTES,
    folder_of,
    is_weight_file,
    list_directory,
    open_regular,
    parse_json,
    quote,
    read_json,
    size_of,
)
from merit_fast.merge.read.remote import Location
from merit_fast.merge.read.weight_files import ADAPTER_FILE as ADAPTER_FILE
from merit_fast.merge.read.weight_files import INDEX_FILE as INDEX_FILE
from merit_fast.merge.read.weight_files import SINGLE_FILE as SINGLE_FILE
from merit_fast.merge.read.weight_files import weight_files

MAX_HEADER_BYTES = MAX_JSON_BYTES
_MAX_NAME = 1000  # characters; bounds every message
_MAX_NUMBER = 2**63 - 1
_MAX_DIMENSIONS = 64  # as in torch and NumPy
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """A model's directory or file: its tensors, and which file holds which, in file order.

    ``notes``: sentences for the summary about what was changed while it was read.
    """

    path: Location
    tensors: Mapping[str, TensorEntry]
    shards: tuple[tuple[str, tuple[str, ...]], ...]  # (file name, tensor names by offset)
    notes: tuple[str, ...] = field(default=(), kw_only=True)


def read_checkpoint(path: Location) -> Checkpoint:
    """Reads the headers of a model: a safetensors file, or a directory of them.

    In a directory an index counts first, then model.safetensors, then what ``weight_files`` finds.

    Raises:
        InputError: a rule of the format is broken; the message names file, tensor, rule and value.
    """
    if is_weight_file(path):
        return replace(read_files(folder_of(path), [path.name]), path=path)
    present = list_directory(path)
    found = weight_files(path, present)
    if found is None:
        raise InputError(
            f"{path}: holds neither {INDEX_FILE} nor {SINGLE_FILE}{_hint(path, present)}"
        )
    notes = (found.note,) if found.note else ()
    if found.index is None:
        return replace(read_files(path, found.files), notes=notes)
    index = path / found.index
    weight_map = _read_weight_map(index)
    files = sorted(set(weight_map.values()))
    if SINGLE_FILE in present and SINGLE_FILE not in files:
        raise InputError(
            f"{index}: does not name {SINGLE_FILE}, which is next to it; remove the stale one"
        )
    checkpoint = read_files(path, files)
    _check_index(index, weight_map, checkpoint.tensors)
    return replace(checkpoint, notes=notes)


def read_files(path: Location, files: Sequence[str]) -> Checkpoint:
    """The tensors of these safetensors files of a directory, whatever else it holds.

    Raises:
        InputError: as ``read_checkpoint``; also where a tensor is in two files, or there is none.
    """
    tensors: dict[str, TensorEntry] = {}
    shards = []
    for name in files:
        entries = read_header(path / name)
        for entry in entries:
            if entry.name in tensors:
                raise InputError(
                    f"{path / name}: {entry.name}: is in {tensors[entry.name].file.name} too"
                )
            tensors[entry.name] = entry
        shards.append((name, tuple(entry.name for entry in entries)))
    if not tensors:
        raise InputError(f"{path}: {', '.join(files)}: holds no tensor")
    return Checkpoint(path, tensors, tuple(shards))


def read_header(file: Location) -> list[TensorEntry]:
    """The tensors of one safetensors file, by offset."""
    with open_regular(file) as opened:
        size = size_of(opened)
        prefix = opened.read(8)
        if len(prefix) < 8:
            raise InputError(
                f"{file}: must begin with the 8 bytes of its header's length, holds "
                f"{len(prefix)} bytes"
            )
        length = struct.unpack("<Q", prefix)[0]
        if length > MAX_HEADER_BYTES:
            raise InputError(
                f"{file}: header length must be at most {MAX_HEADER_BYTES} bytes, got {length}"
            )
        if length > size - 8:
            raise InputError(
                f"{file}: header length must be at most {size - 8}, what the file holds, got "
                f"{length}"
            )
        text = opened.read(length)
    return parse_header(file, text, size)


def parse_header(file: Location, text: bytes, size: int) -> list[TensorEntry]:
    """Tensors that a header's ``text`` describes, by offset, checked against the file's size."""
    header = parse_json(text, f"{file}: header")
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise InputError(
            f"{file}: header: must be a JSON object from its first byte on, got {quote(text[:40])}"
        )
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise InputError(
            f"{file}: __metadata__: must be a mapping of text to text, got {quote(metadata)}"
        )
    start = 8 + len(text)
    entries = sorted(
        (_entry(file, name, value, start, size) for name, value in header.items()),
        key=lambda entry: (entry.offset, entry.num_bytes),
    )
    end = start
    last = "the header"
    for entry in entries:
        if entry.offset != end:
            rule = "overlaps" if entry.offset < end else "leaves a hole after"
            raise InputError(
                f"{file}: {entry.name}: {rule} {last}: must start at {end - start}, got "
                f"{entry.offset - start}"
            )
        end += entry.num_bytes
        last = entry.name
    if end != size:
        raise InputError(f"{file}: holds {size} bytes, its header describes {end}")
    return entries


def _entry(file: Location, name: str, value: Any, start: int, size: int) -> TensorEntry:
    check_name(file, name)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(
            f"{file}: {name}: must be an object of dtype, shape and data_offsets, got "
            f"{quote(value)}"
        )
    dtype = value["dtype"]
    shape = value["shape"]
    offsets = value["data_offsets"]
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n <= _MAX_NUMBER for n in numbers
        ):
            raise InputError(
                f"{file}: {name}: {key} must be integers from 0 to 2^63 - 1, got {quote(numbers)}"
            )
    if len(shape) > _MAX_DIMENSIONS:
        raise InputError(
            f"{file}: {name}: must have at most {_MAX_DIMENSIONS} dimensions, got {len(shape)}"
        )
    if len(offsets) != 2:
        raise InputError(f"{file}: {name}: data_offsets must be 2 integers, got {quote(offsets)}")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InputError(
            f"{file}: {name}: dtype must be one of {', '.join(ITEM_BYTES)}, got {quote(dtype)}"
        )
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    begin, stop = offsets
    if stop - begin != num_bytes:
        rule = f"{dtype} {quote(shape)} must span {quote(num_bytes)} bytes"
        raise InputError(f"{file}: {name}: {rule}, got {stop - begin}")
    if start + stop > size:
        raise InputError(f"{file}: {name}: ends at byte {start + stop}, the file at {size}")
    return TensorEntry(name, dtype, tuple(shape), file, start + begin, num_bytes)


def _read_weight_map(index: Location) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{index}: weight_map: must be a mapping of tensor to file, got {quote(weight_map)}"
        )
    for tensor, name in weight_map.items():
        check_name(index, tensor)
        plain = isinstance(name, str) and name.isprintable() and not {"/", "\\"} & set(name)
        if not plain or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: {tensor}: must name a .safetensors file of this directory, got "
                f"{quote(name)}"
            )
    return weight_map


def _check_index(
    index: Location, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]
) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise InputError(f"{index}: {name}: is not in {file}")
        if tensors[name].file.name != file:
            raise InputError(f"{index}: {name}: must be in {file}, is in {tensors[name].file.name}")
    for name, entry in tensors.items():
        if name not in weight_map:
            raise InputError(f"{index}: {name}: is in {entry.file.name} but not in the index")


def _is_text(value: object) -> bool:
    """Whether it is a string of whole characters, no half of a surrogate pair."""
    return isinstance(value, str) and not any(
        "\ud800" <= character <= "\udfff" for character in value
    )


def check_name(file: Location, name: str) -> None:
    """Raises InputError if a tensor's name would break a message, or is too long."""
    if not name or not name.isprintable() or len(name) > _MAX_NAME:
        raise InputError(
            f"{file}: {quote(name)}: a name must be 1 to {_MAX_NAME} printable characters"
        )


def pickle_hint(path: Location, present: Sequence[str]) -> str:
    """Hint for a directory without safetensors: the command that writes them, or ""."""
    pickles = sorted(
        (name for name in present if name.endswith(_PICKLES)), key=lambda name: "_model" not in name
    )
    if not pickles:
        return ""
    first = pickles[0]
    command = ""
    if first.startswith("pytorch_model"):
        command = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained({str(path)!r}, dtype='auto').save_pretrained({str(path)!r})"
        )
    elif first == "adapter_model.bin":
        command = (
            "import torch; from safetensors.torch import save_file; "
            f"t = torch.load({str(path / first)!r}, map_location='cpu', weights_only=True); "
            f"save_file({{n: v.clone() for n, v in t.items()}}, {str(path / ADAPTER_FILE)!r})"
        )
    remedy = (
        f"convert it: python -c {shlex.quote(command)}" if command else "only safetensors are read"
    )
    return f"; {quote(first)[1:-1]} is a pickle file, which can run code when it is read; {remedy}"


def _hint(path: Location, present: Sequence[str]) -> str:
    """Hint for a directory whose weights are in another form."""
    if ADAPTER_FILE in present:
        return "; it is an adapter, which needs a base model"
    return pickle_hint(path, present)
