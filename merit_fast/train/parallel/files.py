"""safetensors files that are written and read one tensor at a time, whole or divided."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merit_fast.errors import InputError
from merit_fast.train.parallel.pieces import (
    is_divided,
    own_part,
    own_run,
    own_values,
    rows_of,
    stream_bytes,
)
from merit_fast.train.parallel.ranks import Ranks
from merit_fast.train.parallel.stored import Run

# Names of the format, in the order in which safetensors sorts dtypes: the last one comes first.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_FLOATS = ("F16", "BF16", "F32", "F64")
_ALIGNMENT = 8


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    ranks: Ranks,
    runs: Mapping[str, Run] | None = None,
) -> None:
    """Writes a safetensors file with the bytes of ``safetensors.torch.save_file``.

    Every process calls it with the same names. The leader writes; it never holds more of a divided
    tensor than its own rows and one piece.

    Args:
        path: the file.
        tensors: name in the file -> the tensor.
        metadata: texts for the file's header.
        ranks: the processes.
        runs: name in the file -> the part of the tensor that it names; absent: all of it.

    Raises:
        OSError: the file cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-_place(tensors[name]), name))
    parts = runs or {}
    elements = {name: parts[name].elements if name in parts else None for name in order}
    shapes = {name: parts[name].shape if name in parts else tensors[name].shape for name in order}
    if not ranks.leads:
        for name in order:
            for _ in stream_bytes(tensors[name], ranks, elements[name]):
                raise AssertionError("only the leader gets pieces")
        return
    with path.open("wb") as file:
        dtypes = {name: tensors[name].dtype for name in order}
        file.write(_header(dtypes, shapes, metadata))
        for name in order:
            for piece in stream_bytes(tensors[name], ranks, elements[name]):
                file.write(piece)


def fill_tensor(
    file: Any, name: str, tensor: Tensor, ranks: Ranks, path: Path, run: Run | None = None
) -> None:
    """Reads a tensor, or this process's rows of a divided one, from an open safetensors file.

    Args:
        file: of ``safe_open``.
        name: the tensor's name in the file.
        tensor: gets the values, in its own dtype.
        ranks: the processes among which it is divided.
        path: the file's path, for the error message.
        run: the part of the tensor that the file's tensor holds; None: all of it.

    Raises:
        InputError: the file's tensor is absent, or of another shape or kind of numbers.
    """
    try:
        stored = file.get_slice(name)
    except Exception as error:  # safetensors' own kind, without a public base class
        raise InputError(f"{path}: {name}: is not there ({type(error).__name__})") from None
    shape = list(tensor.shape if run is None else run.shape)
    stored_shape = stored.get_shape()
    kind = _DTYPES[tensor.dtype]
    is_same_kind = stored.get_dtype() in (_FLOATS if kind in _FLOATS else (kind,))
    if stored_shape != shape or not is_same_kind:
        wanted = f"{shape} of {kind}"
        given = f"{stored_shape} of {stored.get_dtype()}"
        raise InputError(f"{path}: {name}: must be {wanted}, got {given}")
    with torch.no_grad():
        if run is not None:
            _fill_run(stored, tensor, run, ranks)
            return
        if not is_divided(tensor):
            tensor.copy_(file.get_tensor(name))
            return
        first, count = rows_of(shape[0], ranks.rank, ranks.size)
        part = own_part(tensor)
        assert part.shape[0] == count, (name, part.shape, count)
        if count:
            part.copy_(stored[first : first + count])


def _fill_run(stored: Any, tensor: Tensor, run: Run, ranks: Ranks) -> None:
    """Reads the rows of a stored tensor that lie in this process's rows of a divided one."""
    start, count = run.elements
    first, num_own = own_run(tensor, start, count, ranks.rank, ranks.size)
    if not num_own:
        return
    width = run.shape[1:].numel()
    first_row, rest = divmod(first - start, width)
    num_rows, end = divmod(num_own, width)
    assert not rest and not end, (run, first, num_own)  # a row of the tensor holds whole rows
    values = stored[first_row : first_row + num_rows]
    own_values(tensor, ranks, run.elements).copy_(values.reshape(-1))


def _place(tensor: Tensor) -> int:
    return list(_DTYPES).index(tensor.dtype)


def _header(
    dtypes: Mapping[str, torch.dtype],
    shapes: Mapping[str, torch.Size],
    metadata: Mapping[str, str],
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, dtype in dtypes.items():
        stop = start + shapes[name].numel() * dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
