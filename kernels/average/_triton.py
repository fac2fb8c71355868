"""One launch for any number of tensors: a table on the device says where each lies and which blocks are its own.

The table is one int64 vector: the K weights (bits of float64), then N first blocks, N sizes, N signatures' places, and
K + 1 rows of N addresses, the last of the results. A signature, an integer known to the compiler, holds what a tensor's
code depends on: bit 0, all its addresses are multiples of 16; bit 1, sums are float64; then two bits per element type.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from merit_fast.kernels.average._tensors import DTYPES

BLOCK = 1024  # elements of one program
ALIGNED, WIDE = 1, 2
# Without contraction, so that the result does not depend on what the compiler fuses.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _pointer(address, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    if CODE == 0:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif CODE == 1:
        pointer = address.to(tl.pointer_type(tl.float16))
    elif CODE == 2:
        pointer = address.to(tl.pointer_type(tl.float32))
    else:
        pointer = address.to(tl.pointer_type(tl.float64))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _term(
    table,
    row,
    count,
    place,
    inside,
    k: tl.constexpr,
    SIGNATURE: tl.constexpr,
    FULL: tl.constexpr,
    SUM: tl.constexpr,
):
    pointer = (
        _pointer(tl.load(row + k * count), (SIGNATURE >> (2 * k + 2)) & 3, SIGNATURE & 1) + place
    )
    value = tl.load(pointer) if FULL else tl.load(pointer, mask=inside, other=0.0)
    return tl.load(table + k).to(tl.float64, bitcast=True).to(SUM) * value.to(SUM)


@triton.jit
def _average_block(
    table,
    row,
    count,
    first,
    size,
    K: tl.constexpr,
    SIGNATURE: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``FULL``: without a mask, which would cut 128-bit accesses into elements."""
    SUM: tl.constexpr = tl.float64 if SIGNATURE & 2 else tl.float32
    place = first + tl.arange(0, BLOCK)
    inside = place < size
    total = _term(table, row, count, place, inside, 0, SIGNATURE, FULL, SUM)
    for k in tl.static_range(1, K):
        total += _term(table, row, count, place, inside, k, SIGNATURE, FULL, SUM)
    CODE: tl.constexpr = (SIGNATURE >> (2 * K + 2)) & 3
    if CODE != 3:
        total = total.to(tl.float32)
    pointer = _pointer(tl.load(row + K * count), CODE, SIGNATURE & 1) + place
    value = total.to(pointer.dtype.element_ty)
    if FULL:
        tl.store(pointer, value)
    else:
        tl.store(pointer, value, mask=inside)


@triton.jit(do_not_specialize=["count"])
def average_kernel(table, count, K: tl.constexpr, SIGNATURES: tl.constexpr, BLOCK: tl.constexpr):
    """One program per block of BLOCK elements of one tensor."""
    block = tl.program_id(0).to(tl.int64)
    starts = table + K
    low, high = count * 0, count
    while high - low > 1:  # the last tensor whose first block is not after this one
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    first = (block - tl.load(starts + low)) * BLOCK
    size = tl.load(starts + count + low)
    kind = tl.load(starts + 2 * count + low)
    row = starts + 3 * count + low
    for s in tl.static_range(len(SIGNATURES)):
        if kind == s:
            if first + BLOCK <= size:
                _average_block(table, row, count, first, size, K, SIGNATURES[s], True, BLOCK)
            else:
                _average_block(table, row, count, first, size, K, SIGNATURES[s], False, BLOCK)


def average(columns: Sequence[tuple[Sequence[Tensor], Tensor]], weights: Sequence[float]) -> None:
    """Each column: K flat contiguous tensors of one length and where their average goes, of at least one element."""
    device = columns[0][1].device
    table, signatures, blocks = describe(columns, weights)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
        with torch.cuda.device(device):
            average_kernel[(blocks,)](
                table, len(columns), len(weights), signatures, BLOCK, **OPTIONS
            )
    else:
        average_kernel[(blocks,)](table, len(columns), len(weights), signatures, BLOCK, **OPTIONS)


def describe(
    columns: Sequence[tuple[Sequence[Tensor], Tensor]], weights: Sequence[float]
) -> tuple[Tensor, tuple[int, ...], int]:
    """The table on the CPU, the signatures it names, ascending, and the number of blocks."""
    sizes = [len(target) for _, target in columns]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // BLOCK))
    kinds = [signature([*tensors, target]) for tensors, target in columns]
    signatures = tuple(sorted(set(kinds)))
    addresses = [
        [tensor.data_ptr() for tensor in (*tensors, target)] for tensors, target in columns
    ]
    rows = [address for row in zip(*addresses, strict=True) for address in row]
    bits = struct.unpack(f"{len(weights)}q", struct.pack(f"{len(weights)}d", *weights))
    places = [signatures.index(kind) for kind in kinds]
    return (
        torch.tensor([*bits, *starts[:-1], *sizes, *places, *rows], dtype=torch.int64),
        signatures,
        starts[-1],
    )


def signature(tensors: Sequence[Tensor]) -> int:
    """Of the K inputs and, last, the result."""
    value = ALIGNED if all(tensor.data_ptr() % 16 == 0 for tensor in tensors) else 0
    value |= WIDE if torch.float64 in {tensor.dtype for tensor in tensors} else 0
    for k, tensor in enumerate(tensors):
        value |= DTYPES.index(tensor.dtype) << (2 * k + 2)
    return value
