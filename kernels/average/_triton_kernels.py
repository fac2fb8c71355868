"""The average's Triton kernel: one launch for any number of tensors, which ``_tables`` describes.

A signature, an integer known to the compiler, holds what a tensor's code depends on: bit 0, all its
addresses are multiples of 16; bit 1, sums are float64; then two bits for each element type.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from merit_fast.kernels._tables import pointer_to, tensor_of_block


@triton.jit
def _pointer(address, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    if CODE == 0:
        pointer = pointer_to(address, tl.bfloat16, ALIGNED)
    elif CODE == 1:
        pointer = pointer_to(address, tl.float16, ALIGNED)
    elif CODE == 2:
        pointer = pointer_to(address, tl.float32, ALIGNED)
    else:
        pointer = pointer_to(address, tl.float64, ALIGNED)
    return pointer


@triton.jit
def _term(
    table,
    row,
    count,
    index,
    inside,
    k: tl.constexpr,
    SIGNATURE: tl.constexpr,
    FULL: tl.constexpr,
    SUM: tl.constexpr,
):
    """weights[k] times a block of input k."""
    pointer = (
        _pointer(tl.load(row + k * count), (SIGNATURE >> (2 * k + 2)) & 3, SIGNATURE & 1) + index
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
    """Averages elements from ``first``. ``FULL``: no mask, which would split 128-bit accesses."""
    SUM: tl.constexpr = tl.float64 if SIGNATURE & 2 else tl.float32
    index = first + tl.arange(0, BLOCK)
    inside = index < size
    total = _term(table, row, count, index, inside, 0, SIGNATURE, FULL, SUM)
    for k in tl.static_range(1, K):
        total += _term(table, row, count, index, inside, k, SIGNATURE, FULL, SUM)
    CODE: tl.constexpr = (SIGNATURE >> (2 * K + 2)) & 3
    if CODE != 3:
        total = total.to(tl.float32)
    pointer = _pointer(tl.load(row + K * count), CODE, SIGNATURE & 1) + index
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
    low = tensor_of_block(starts, count, block)
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
