"""Safetensors files made byte by byte, right and wrong, for the tests of their reader."""

import json
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.merge.read.headers import parse_header, reference_header

INDEX = "model.safetensors.index.json"


def tensor(shape: Sequence[int], begin: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, stop]}


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file: ``header`` as JSON or as it is, under its own length or another."""
    text: bytes = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_model(directory: Path, files: dict[str, bytes], weight_map: Any = None) -> Path:
    """A model directory of these files; ``weight_map`` as an index, or the bytes of one."""
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    if weight_map is not None:
        index = (
            weight_map
            if isinstance(weight_map, bytes)
            else json.dumps({"weight_map": weight_map}).encode()
        )
        (directory / INDEX).write_bytes(index)
    return directory


def one_tensor(name: str = "w", data: bytes = bytes(8)) -> bytes:
    return pack({name: tensor([len(data) // 4], 0, len(data))}, data)


def backends_agree(text: bytes, size: int) -> None:
    """Checks that the native parser and the reference give the same tensors or the same error."""
    native = partial(parse_header, backend="cpu")
    results: list[object] = []
    for read in (native, reference_header):
        try:
            results.append(read(Path("f"), text, size))
        except InputError as error:
            results.append(str(error))
    assert results[0] == results[1]
