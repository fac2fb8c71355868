"""AdamW's Triton kernel: one launch for all tensors of a step, which ``_tables`` describes.

``KINDS`` is all that the compiler knows of a launch: aligned to 16 bytes, bf16 weights, bf16
gradients, kind of moments, kind of master, average, stochastic, zero_grad, clipped.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from merit_fast.kernels._tables import pointer_to, tensor_of_block
from merit_fast.kernels.optimizer._triton_numbers import (
    RANDOM_BLOCK,
    block_keys,
    code_shift,
    first_round,
    load,
    load_codes,
    nearest_bits,
    number_at,
    random_bits,
    read,
    store_bf16,
    store_codes,
    with_random,
    write,
)

# Rows of the table, in the order in which ``_triton.describe`` writes them.
SIZE = tl.constexpr(1)
WEIGHT = tl.constexpr(2)
GRAD = tl.constexpr(3)
EXP_AVG = tl.constexpr(4)
EXP_AVG_SQ = tl.constexpr(5)
EXP_AVG_SCALE = tl.constexpr(6)
EXP_AVG_SQ_SCALE = tl.constexpr(7)
MASTER = tl.constexpr(8)
AVERAGE = tl.constexpr(9)
KEY = tl.constexpr(10)
RATE = tl.constexpr(11)
ROOT = tl.constexpr(12)
SHARE = tl.constexpr(13)
FIRST = tl.constexpr(14)
WON = tl.constexpr(15)


@triton.jit
def _load_moments(
    first, second, first_scale, second_scale, index, row, inside, full_row,
    KINDS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    ALIGNED: tl.constexpr = KINDS[0]
    MOMENTS: tl.constexpr = KINDS[3]
    if MOMENTS == 2:
        m = load_codes(first, first_scale, index, row, inside, full_row, False, ALIGNED, FULL)
        v = load_codes(second, second_scale, index, row, inside, full_row, True, ALIGNED, FULL)
    else:
        m = load(first, index, inside, MOMENTS == 1, ALIGNED, FULL)
        v = load(second, index, inside, MOMENTS == 1, ALIGNED, FULL)
    return m, v


@triton.jit
def _load_weight(weight, master, won, index, inside, KINDS: tl.constexpr, FULL: tl.constexpr):
    """The float32 weight: itself, its master, or the bf16 weight joined with its low bits.

    A weight that is not its float32 master rounded is the master, and ``won`` becomes 1.
    """
    ALIGNED: tl.constexpr = KINDS[0]
    KIND: tl.constexpr = KINDS[4] if KINDS[1] else 0
    w = load(weight, index, inside, KINDS[1], ALIGNED, FULL)
    if KIND == 1:
        full = load(master, index, inside, False, ALIGNED, FULL)
        stored = w.to(tl.uint32, bitcast=True)
        differs = (nearest_bits(full) != (stored >> 16)) & inside
        counted = differs & ((stored & 0x7FFFFFFF) <= 0x7F800000)  # NaN has many bits
        tl.store(won, 1, mask=tl.max(tl.max(counted.to(tl.int32), axis=1), axis=0) > 0)
        w = tl.where(differs, w, full)
    elif KIND == 2:
        low = read(pointer_to(master, tl.int16, ALIGNED) + index, inside, FULL).to(tl.int32)
        w = (w.to(tl.int32, bitcast=True) + low).to(tl.float32, bitcast=True)
    elif KIND == 3:
        low = read(pointer_to(master, tl.int8, ALIGNED) + index, inside, FULL).to(tl.int32)
        w = (w.to(tl.int32, bitcast=True) + low * 256).to(tl.float32, bitcast=True)
    return w


@triton.jit
def _store_moments(
    first, second, first_scale, second_scale, index, row, inside, full_row, m, v, bits,
    weight_bits, KINDS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    ALIGNED: tl.constexpr = KINDS[0]
    MOMENTS: tl.constexpr = KINDS[3]
    STOCHASTIC: tl.constexpr = KINDS[6]
    if MOMENTS == 2:
        shift = code_shift(weight_bits) if STOCHASTIC else tl.zeros(m.shape, tl.float32)
        store_codes(
            first, first_scale, index, row, inside, full_row, m, shift, False, ALIGNED, FULL
        )
        store_codes(
            second, second_scale, index, row, inside, full_row, v, shift, True, ALIGNED, FULL
        )
    elif MOMENTS == 1:
        store_bf16(first, index, inside, m, bits >> 16, STOCHASTIC, ALIGNED, FULL)
        store_bf16(second, index, inside, v, bits & 0xFFFF, STOCHASTIC, ALIGNED, FULL)
    else:
        write(pointer_to(first, tl.float32, ALIGNED) + index, m, inside, FULL)
        write(pointer_to(second, tl.float32, ALIGNED) + index, v, inside, FULL)


@triton.jit
def _store_weight(
    weight, master, index, inside, w, bits, KINDS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Returns the new weight as it was stored, master included."""
    ALIGNED: tl.constexpr = KINDS[0]
    KIND: tl.constexpr = KINDS[4] if KINDS[1] else 0
    if not KINDS[1]:
        write(pointer_to(weight, tl.float32, ALIGNED) + index, w, inside, FULL)
    elif KIND >= 2:  # to nearest, halves away from zero
        raw = w.to(tl.uint32, bitcast=True)
        if KIND == 3:
            raw = with_random(w, bits >> 24 if KINDS[6] else 0x80 + (raw & 0))
        raw = tl.where(w != w, 0x7FC00000, raw).to(tl.uint32)
        rounded = ((raw + 0x8000) >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
        write(pointer_to(weight, tl.int16, ALIGNED) + index, rounded, inside, FULL)
        if KIND == 3:
            low = (raw >> 8).to(tl.uint8).to(tl.int8, bitcast=True)
            write(pointer_to(master, tl.int8, ALIGNED) + index, low, inside, FULL)
            w = (raw & 0xFFFFFF00).to(tl.float32, bitcast=True)
        else:
            low = raw.to(tl.uint16).to(tl.int16, bitcast=True)
            write(pointer_to(master, tl.int16, ALIGNED) + index, low, inside, FULL)
    elif KIND == 1:
        write(pointer_to(master, tl.float32, ALIGNED) + index, w, inside, FULL)
        store_bf16(weight, index, inside, w, bits, False, ALIGNED, FULL)
    else:
        w = store_bf16(weight, index, inside, w, bits >> 16, KINDS[6], ALIGNED, FULL)
    return w


@triton.jit
def _zero_gradient(grad, index, inside, KINDS: tl.constexpr, FULL: tl.constexpr):
    TYPE: tl.constexpr = tl.int16 if KINDS[2] else tl.float32
    zeros = tl.zeros(index.shape, TYPE)
    write(pointer_to(grad, TYPE, KINDS[0]) + index, zeros, inside, FULL)


@triton.jit
def _update(
    column, count, first_row, size, clip, decay, beta1, rest1, beta2, rest2, epsilon,
    KINDS: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Updates ROWS x WIDTH elements of the tensor whose numbers are in the table's ``column``."""
    ALIGNED: tl.constexpr = KINDS[0]
    row = first_row + tl.arange(0, ROWS)
    index = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = index < size
    full_row = row * WIDTH < size
    weight = tl.load(column + WEIGHT * count)
    grad = tl.load(column + GRAD * count)
    first = tl.load(column + EXP_AVG * count)
    second = tl.load(column + EXP_AVG_SQ * count)
    first_scale = tl.load(column + EXP_AVG_SCALE * count)
    second_scale = tl.load(column + EXP_AVG_SQ_SCALE * count)
    master = tl.load(column + MASTER * count)
    key = tl.load(column + KEY * count)
    won = pointer_to(tl.load(column + WON * count), tl.uint8, False)

    g = load(grad, index, inside, KINDS[2], ALIGNED, FULL)
    if KINDS[8]:
        g = g * tl.load(clip)
    m, v = _load_moments(
        first, second, first_scale, second_scale, index, row, inside, full_row, KINDS, FULL
    )
    w = _load_weight(weight, master, won, index, inside, KINDS, FULL)

    near = rest1 < 0.5
    m = tl.where(near, m, g) + tl.where(near, rest1, -beta1) * (g - m)
    v = v * beta2 + rest2 * g * g
    denominator = tl.sqrt_rn(v) * number_at(column, ROOT * count) + epsilon
    w = w * decay - number_at(column, RATE * count) * tl.div_rn(m, denominator)

    begin = first_row * WIDTH + tl.load(column + FIRST * count)
    block = begin // RANDOM_BLOCK  # the program's elements are in this one and the next
    weight_key, moment_key = block_keys(block, key)
    next_weight_key, next_moment_key = block_keys(block + 1, key)
    place = index + tl.load(column + FIRST * count)
    shared = first_round(place, key)
    bits = random_bits(shared, place, block, weight_key, next_weight_key)
    moment_bits = random_bits(shared, place, block, moment_key, next_moment_key)
    _store_moments(
        first, second, first_scale, second_scale, index, row, inside, full_row, m, v, moment_bits,
        bits, KINDS, FULL,
    )  # fmt: skip
    w = _store_weight(weight, master, index, inside, w, bits, KINDS, FULL)
    if KINDS[5]:
        average = pointer_to(tl.load(column + AVERAGE * count), tl.float32, ALIGNED) + index
        old = read(average, inside, FULL)
        write(average, old + (w - old) * number_at(column, SHARE * count), inside, FULL)
    if KINDS[7]:
        _zero_gradient(grad, index, inside, KINDS, FULL)


@triton.jit(do_not_specialize=["count"])
def adamw_kernel(
    table, count, clip, decay, beta1, rest1, beta2, rest2, epsilon,
    KINDS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program per ROWS x WIDTH elements of one tensor."""
    block = tl.program_id(0).to(tl.int64)
    column = table + tensor_of_block(table, count, block)
    size = tl.load(column + SIZE * count)
    first_row = (block - tl.load(column)) * ROWS
    if (first_row + ROWS) * WIDTH <= size:
        _update(
            column, count, first_row, size, clip, decay, beta1, rest1, beta2, rest2, epsilon,
            KINDS, True, ROWS, WIDTH,
        )  # fmt: skip
    else:
        _update(
            column, count, first_row, size, clip, decay, beta1, rest1, beta2, rest2, epsilon,
            KINDS, False, ROWS, WIDTH,
        )  # fmt: skip
