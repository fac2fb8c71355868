"""Launches over many tensors at once, for Triton.

A launch takes one int64 vector on the device, its table. The table holds a row of N numbers for
each property of the N tensors: first block, size, address and so on. Tensors are cut into blocks of
equal size, one program a block. Programs find their tensor by a binary search in the row of first
blocks.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import itertools
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from merit_fast.kernels._devices import device_of


@triton.jit
def tensor_of_block(first_blocks, count, block):
    """Number of the last tensor whose first block is not after ``block``."""
    low = count * 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(first_blocks + middle) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def pointer_to(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address from the table as a pointer; ``ALIGNED``: it is a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def first_blocks(sizes: Iterable[int], block: int) -> tuple[list[int], int]:
    """The first block of every tensor, and the number of blocks of all tensors."""
    starts = [0, *itertools.accumulate(-(-size // block) for size in sizes)]
    return starts[:-1], starts[-1]


def table_of(rows: Iterable[Sequence[int]]) -> Tensor:
    """The table on the CPU."""
    return torch.tensor([number for row in rows for number in row], dtype=torch.int64)


def double_bits(values: Sequence[float]) -> list[int]:
    """The bits of float64 numbers."""
    return list(struct.unpack(f"{len(values)}q", struct.pack(f"{len(values)}d", *values)))


def single_bits(values: Sequence[float]) -> list[int]:
    """The bits of float32 numbers."""
    return list(struct.unpack(f"{len(values)}i", struct.pack(f"{len(values)}f", *values)))


def on_device_of(tensor: Tensor, table: Tensor) -> Tensor:
    """The table where the tensor is; nothing waits for the copy."""
    if tensor.device.type == "cuda":
        return table.pin_memory().to(tensor.device, non_blocking=True)
    return table


def launch(
    kernel: Any, blocks: int, tensor: Tensor, arguments: Sequence[Any], options: Mapping[str, Any]
) -> None:
    """Launches one program a block on the device of ``tensor``."""
    with device_of(tensor):
        kernel[(blocks,)](*arguments, **options)
