"""Tensors of safetensors files, mapped into memory: the system reads what is used, when it is."""

import json
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from merit_fast.errors import InputError, one_line

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python names from 3.13 on


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of a file.

    Attributes:
        start, stop: its bytes in the file.
    """

    file: mmap.mmap
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def view(self) -> Tensor:
        """The values; nothing is copied unless the file holds them at an odd place."""
        flat: Tensor
        if self.start == self.stop:
            flat = torch.empty(0, dtype=self.dtype)
        elif self.start % self.dtype.itemsize:
            held = bytearray(self.file[self.start : self.stop])
            flat = torch.frombuffer(held, dtype=self.dtype)
        else:
            count = (self.stop - self.start) // self.dtype.itemsize
            flat = torch.frombuffer(self.file, dtype=self.dtype, count=count, offset=self.start)
        return flat.view(self.shape)


def map_tensors_of(files: Iterable[Path]) -> dict[str, MappedTensor]:
    """Every tensor of some files, by name.

    Raises:
        InputError: a file is absent, damaged or of another format, or two files hold one name.
    """
    tensors: dict[str, MappedTensor] = {}
    for file in files:
        for name, tensor in _map_file(file).items():
            if name in tensors:
                raise InputError(f"{file}: {name}: must be in one file of the model, is in two")
            tensors[name] = tensor
    return tensors


def forget_pages(tensors: Iterable[MappedTensor]) -> None:
    """Takes tensors out of this process's memory; a later use maps them again."""
    _advise(tensors, mmap.MADV_DONTNEED)


def prefetch_pages(tensors: Iterable[MappedTensor]) -> None:
    """Lets the system begin to read tensors from the disk."""
    _advise(tensors, mmap.MADV_WILLNEED)


def _advise(tensors: Iterable[MappedTensor], advice: int) -> None:
    for tensor in tensors:
        first = tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
        if tensor.stop > first:
            tensor.file.madvise(advice, first, tensor.stop - first)


def _map_file(file: Path) -> dict[str, MappedTensor]:
    try:
        with safe_open(file, framework="pt"):  # checks the header
            pass
        descriptor = os.open(file, os.O_RDONLY)
    except Exception as error:  # the reader raises many kinds; all mean that it cannot be read
        raise InputError(f"{file}: is not a safetensors file ({one_line(error)})") from None
    try:
        # Private, so that a write changes no file, and without a reserve for such writes.
        mapped = mmap.mmap(
            descriptor,
            0,
            flags=mmap.MAP_PRIVATE | _NO_RESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    finally:
        os.close(descriptor)
    length = int.from_bytes(mapped[:8], "little")
    header: dict[str, Any] = json.loads(mapped[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise InputError(
                f"{file}: {name}: dtype: must be one of {known}, got {entry['dtype']}; a model of "
                "such tensors runs in memory only"
            )
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        dtype = _DTYPES[entry["dtype"]]
        tensors[name] = MappedTensor(mapped, dtype, tuple(entry["shape"]), begin, end)
    return tensors
