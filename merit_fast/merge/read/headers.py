"""Headers of safetensors files: names, dtypes, shapes and byte ranges, all checked.

File: u64 little-endian header length, JSON header, data; offsets count from the end of the header,
without holes. Time is linear in the header's bytes and memory is bounded, whatever they hold.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

from merit_fast.errors import InputError
from merit_fast.kernels import dispatch
from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.read.files import MAX_JSON_BYTES, open_regular, parse_json, quote, size_of
from merit_fast.merge.read.remote import Location

MAX_HEADER_BYTES = MAX_JSON_BYTES
MAX_TENSORS = 300_000  # of a file
_MARKS = b'":,[{'
_MAX_MARKS = 2_500_000  # about 100,000 tensors; bounds the objects that Python's JSON makes
_MAX_NAME = 1000  # characters; bounds every message
_MAX_NUMBER = 2**63 - 1
_MAX_DIMENSIONS = 64  # as in torch and NumPy
_Described = tuple[str, str, tuple[int, ...], int, int]  # name, dtype, shape, first byte, end


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


def parse_header(
    file: Location, text: bytes, size: int, backend: str | None = None
) -> list[TensorEntry]:
    """Tensors that a header's ``text`` describes, by offset, checked against the file's size.

    The native parser takes headers in their plain form, of up to 300,000 tensors. Every other text
    goes to the reference, which gives the same entries and words every error.

    Args:
        file: for messages.
        text: JSON: {name: {"dtype": text, "shape": [n], "data_offsets": [first byte, end]}}, and
            texts by name under ``__metadata__``.
        size: bytes of the file.
        backend: as in ``kernels.dispatch``.

    Raises:
        InputError: a rule of the format is broken, or the text is too large to be looked at whole.
    """
    # The backend that somebody asks for is the kernels'; a header needs the module only.
    is_compiled = dispatch.unavailable("merge_files", "cpu", "cpu") is None
    if is_compiled and dispatch.asked(backend) != "eager":
        tensors, error, too_many = dispatch.native().parse_header(
            text=text, most_tensors=MAX_TENSORS
        )
        if too_many:
            raise InputError(f"{file}: header: must describe at most {MAX_TENSORS} tensors")
        if error < 0:
            entries = _plain_entries(file, tensors, 8 + len(text), size)
            if entries is not None:
                return entries
    marks = sum(text.count(mark) for mark in _MARKS)
    if marks > _MAX_MARKS:
        raise InputError(
            f"{file}: header: must hold at most {_MAX_MARKS} quotes, colons, commas and brackets "
            f"unless it is plain ASCII and whole, holds {marks}"
        )
    return reference_header(file, text, size)


def _plain_entries(
    file: Location,
    tensors: Sequence[tuple[str, str, tuple[int, ...], int, int]],
    start: int,
    size: int,
) -> list[TensorEntry] | None:
    """Entries of tensors that follow each other; None where one breaks a rule."""
    for _, dtype, shape, begin, end in tensors:
        if dtype not in ITEM_BYTES or math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
            return None
    if start + (tensors[-1][4] if tensors else 0) != size:
        return None
    return [
        TensorEntry(name, dtype, shape, file, start + begin, end - begin)
        for name, dtype, shape, begin, end in tensors
    ]


def reference_header(file: Location, text: bytes, size: int) -> list[TensorEntry]:
    """``parse_header`` in Python, by the standard library's JSON."""
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


def _is_text(value: object) -> bool:
    """Whether it is a string of whole characters, no half of a surrogate pair."""
    return isinstance(value, str) and not any(
        "\ud800" <= character <= "\udfff" for character in value
    )


def check_name(file: Location, name: str) -> None:
    """Refuses a tensor's name that no message could show."""
    if not name or not name.isprintable() or len(name) > _MAX_NAME:
        raise InputError(
            f"{file}: {quote(name)}: a name must be 1 to {_MAX_NAME} printable characters"
        )
