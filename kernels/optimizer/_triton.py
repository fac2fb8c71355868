"""One launch for all tensors of a call: a table on the device says where each lies and which blocks are its own.

The table is one int64 vector of N numbers a row: first blocks, sizes, the addresses of weights, gradients, moments,
their scales, masters and averages (0: none), keys, and three float32 as bits: step size, root, share in the average.
bf16 is read and written as its bits, so that rounding is ours; arithmetic is as in ``_eager``, without contraction.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, WIDTH = 4, 256  # of one program; a row is a block of 8-bit moments
BLOCK = ROWS * WIDTH
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
# Codes of ``KINDS``, which the compiler knows: moments and masters as in csrc/optimizer/optimizer.h.
MOMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
MASTERS = {torch.float32: 1, torch.int16: 2}
_FIRST, _SECOND = tl.constexpr(1 / 127**2), tl.constexpr(1 / 255**4)


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _read(pointer, inside, FULL: tl.constexpr):
    """``FULL``: without a mask, which would cut 128-bit accesses into elements."""
    return tl.load(pointer) if FULL else tl.load(pointer, mask=inside, other=0)


@triton.jit
def _write(pointer, value, inside, FULL: tl.constexpr):
    if FULL:
        tl.store(pointer, value)
    else:
        tl.store(pointer, value, mask=inside)


@triton.jit
def _widened(bits):
    return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _load(address, place, inside, BF16: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    if BF16:
        return _widened(_read(_pointer(address, tl.int16, ALIGNED) + place, inside, FULL))
    return _read(_pointer(address, tl.float32, ALIGNED) + place, inside, FULL)


@triton.jit
def _nearest_bits(value):
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)


@triton.jit
def _stochastic_bits(value, random16):
    bits = value.to(tl.uint32, bitcast=True)
    total = bits + random16
    cut = tl.where((total & 0x7FFFFFFF) >= 0x7F800000, bits, total) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, cut)


@triton.jit
def _store_bf16(
    address,
    place,
    inside,
    value,
    random16,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):
    bits = _stochastic_bits(value, random16) if STOCHASTIC else _nearest_bits(value)
    bits = bits.to(tl.uint16)
    _write(
        _pointer(address, tl.int16, ALIGNED) + place, bits.to(tl.int16, bitcast=True), inside, FULL
    )
    return _widened(bits)


@triton.jit
def _random(place, before, between):
    """Two rounds of Wellons' lowbias32 with a key before each; keys are int64 below 2^32."""
    x = (place & 0xFFFFFFFF).to(tl.uint32) ^ before.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ between.to(tl.uint32) ^ ((place >> 32).to(tl.uint32) * 0x9E3779B9)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _power(x, SECOND: tl.constexpr):
    square = x * x
    return square * square if SECOND else square


@triton.jit
def _load_codes(
    address, scale_address, place, row, inside, full_row,
    SECOND: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = tl.uint8 if SECOND else tl.int8
    code = _read(_pointer(address, TYPE, ALIGNED) + place, inside, FULL).to(tl.float32)
    scale = tl.load(_pointer(scale_address, tl.float32, False) + row, mask=full_row, other=0.0)
    square = code * code if SECOND else code * tl.abs(code)
    share = square * square * _SECOND if SECOND else square * _FIRST
    return share * scale[:, None]


@triton.jit
def _store_codes(
    address, scale_address, place, row, inside, full_row, value, random16,
    SECOND: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = 255.0 if SECOND else 127.0
    MOST: tl.constexpr = 255.0**4 if SECOND else 127.0**2
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    size = bits.to(tl.float32, bitcast=True)
    top = tl.max(tl.where(inside, bits, 0), axis=1).to(tl.float32, bitcast=True)
    usable = (top >= 1.17549435e-38) & (top <= 3.40282347e38)
    place_in = (
        size
        * tl.div_rn(tl.full(top.shape, 1.0, tl.float32), tl.where(usable, top, 1.0))[:, None]
        * MOST
    )
    root = tl.sqrt_rn(place_in)
    if SECOND:
        root = tl.sqrt_rn(root)
    whole = tl.where(root < STEPS - 1, root, STEPS - 1).to(tl.int32).to(tl.float32)
    below, above = _power(whole, SECOND), _power(whole + 1, SECOND)
    share = random16.to(tl.int32).to(tl.float32) * (1.0 / 65536) if STOCHASTIC else 0.5
    code = whole + tl.where(share * (above - below) < place_in - below, 1.0, 0.0)
    code = (
        tl.where((code == 0) & (place_in > 0), 1.0, code)
        if SECOND
        else tl.where(value < 0, -code, code)
    )
    code = tl.where(usable[:, None], code, tl.where(top < 1, 0.0, STEPS)[:, None])
    TYPE: tl.constexpr = tl.uint8 if SECOND else tl.int8
    _write(_pointer(address, TYPE, ALIGNED) + place, code.to(tl.int32).to(TYPE), inside, FULL)
    tl.store(
        _pointer(scale_address, tl.float32, False) + row,
        tl.where((top < 1) & (usable == 0), 0.0, top),
        mask=full_row,
    )


@triton.jit
def _number(table, at):
    return tl.load(table + at).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _update(
    column, count, first_row, size, clip, decay, beta1, rest1, beta2, rest2, epsilon,
    KINDS: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    ALIGNED: tl.constexpr = KINDS[0]
    WEIGHT_BF16: tl.constexpr = KINDS[1]
    MOMENTS: tl.constexpr = KINDS[3]
    MASTER: tl.constexpr = KINDS[4] if WEIGHT_BF16 else 0
    STOCHASTIC: tl.constexpr = KINDS[6]
    row = first_row + tl.arange(0, ROWS)
    place = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside, full_row = place < size, row * WIDTH < size
    weight, grad = tl.load(column + 2 * count), tl.load(column + 3 * count)
    first, second = tl.load(column + 4 * count), tl.load(column + 5 * count)
    first_scale, second_scale = tl.load(column + 6 * count), tl.load(column + 7 * count)
    master, key = tl.load(column + 8 * count), tl.load(column + 10 * count)
    key_low, key_high = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF

    g = _load(grad, place, inside, KINDS[2], ALIGNED, FULL)
    if KINDS[8]:
        g = g * tl.load(clip)
    if MOMENTS == 2:
        m = _load_codes(first, first_scale, place, row, inside, full_row, False, ALIGNED, FULL)
        v = _load_codes(second, second_scale, place, row, inside, full_row, True, ALIGNED, FULL)
    else:
        m = _load(first, place, inside, MOMENTS == 1, ALIGNED, FULL)
        v = _load(second, place, inside, MOMENTS == 1, ALIGNED, FULL)
    if MASTER == 1:
        w = _load(master, place, inside, False, ALIGNED, FULL)
    else:
        w = _load(weight, place, inside, WEIGHT_BF16, ALIGNED, FULL)
    if MASTER == 2:
        missing = _read(_pointer(master, tl.int16, ALIGNED) + place, inside, FULL).to(tl.int32)
        w = (w.to(tl.int32, bitcast=True) + missing).to(tl.float32, bitcast=True)

    near = rest1 < 0.5
    m = tl.where(near, m, g) + tl.where(near, rest1, -beta1) * (g - m)
    v = v * beta2 + rest2 * g * g
    denominator = tl.sqrt_rn(v) * _number(column, 12 * count) + epsilon
    w = w * decay - _number(column, 11 * count) * tl.div_rn(m, denominator)

    moment_bits = _random(place, key_high, key_low)
    if MOMENTS == 2:
        _store_codes(
            first,
            first_scale,
            place,
            row,
            inside,
            full_row,
            m,
            moment_bits >> 16,
            False,
            STOCHASTIC,
            ALIGNED,
            FULL,
        )
        _store_codes(
            second,
            second_scale,
            place,
            row,
            inside,
            full_row,
            v,
            moment_bits & 0xFFFF,
            True,
            STOCHASTIC,
            ALIGNED,
            FULL,
        )
    elif MOMENTS == 1:
        _store_bf16(first, place, inside, m, moment_bits >> 16, STOCHASTIC, ALIGNED, FULL)
        _store_bf16(second, place, inside, v, moment_bits & 0xFFFF, STOCHASTIC, ALIGNED, FULL)
    else:
        _write(_pointer(first, tl.float32, ALIGNED) + place, m, inside, FULL)
        _write(_pointer(second, tl.float32, ALIGNED) + place, v, inside, FULL)
    if not WEIGHT_BF16:
        _write(_pointer(weight, tl.float32, ALIGNED) + place, w, inside, FULL)
    elif MASTER == 2:  # to nearest, halves away from zero
        raw = w.to(tl.uint32, bitcast=True)
        raw = tl.where((raw & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, raw).to(tl.uint32)
        rounded = ((raw + 0x8000) >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
        _write(_pointer(weight, tl.int16, ALIGNED) + place, rounded, inside, FULL)
        _write(
            _pointer(master, tl.int16, ALIGNED) + place,
            raw.to(tl.uint16).to(tl.int16, bitcast=True),
            inside,
            FULL,
        )
    elif MASTER == 1:
        _write(_pointer(master, tl.float32, ALIGNED) + place, w, inside, FULL)
        _store_bf16(weight, place, inside, w, moment_bits, False, ALIGNED, FULL)
    else:
        w = _store_bf16(
            weight,
            place,
            inside,
            w,
            _random(place, key_low, key_high) >> 16,
            STOCHASTIC,
            ALIGNED,
            FULL,
        )
    if KINDS[5]:
        average = _pointer(tl.load(column + 9 * count), tl.float32, ALIGNED) + place
        old = _read(average, inside, FULL)
        _write(average, old + (w - old) * _number(column, 13 * count), inside, FULL)
    if KINDS[7]:
        if KINDS[2]:
            _write(
                _pointer(grad, tl.int16, ALIGNED) + place,
                tl.zeros(place.shape, tl.int16),
                inside,
                FULL,
            )
        else:
            _write(
                _pointer(grad, tl.float32, ALIGNED) + place,
                tl.zeros(place.shape, tl.float32),
                inside,
                FULL,
            )


@triton.jit(do_not_specialize=["count"])
def adamw_kernel(
    table, count, clip, decay, beta1, rest1, beta2, rest2, epsilon,
    KINDS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program per ROWS x WIDTH elements of one tensor; ``KINDS`` as ``describe`` gives them."""
    block = tl.program_id(0).to(tl.int64)
    low, high = count * 0, count
    while high - low > 1:  # the last tensor whose first block is not after this one
        middle = (low + high) // 2
        before = tl.load(table + middle) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    column = table + low
    size = tl.load(column + count)
    first_row = (block - tl.load(column)) * ROWS
    if (first_row + ROWS) * WIDTH <= size:
        _update(
            column,
            count,
            first_row,
            size,
            clip,
            decay,
            beta1,
            rest1,
            beta2,
            rest2,
            epsilon,
            KINDS,
            True,
            ROWS,
            WIDTH,
        )
    else:
        _update(
            column,
            count,
            first_row,
            size,
            clip,
            decay,
            beta1,
            rest1,
            beta2,
            rest2,
            epsilon,
            KINDS,
            False,
            ROWS,
            WIDTH,
        )


def adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scales: Sequence[Tensor],
    masters: Sequence[Tensor],
    averages: Sequence[Tensor],
    clip: Tensor | None,
    rates: Sequence[float],
    keys: Sequence[int],
    numbers: Sequence[float],
    stochastic: bool,
    zero_grad: bool,
) -> None:
    """As ``_ops.adamw``."""
    lists = (weights, grads, exp_avgs, exp_avg_sqs, scales, masters, averages)
    table, kinds, blocks = describe(lists, rates, keys, (stochastic, zero_grad, clip is not None))
    if not blocks:
        return
    device = weights[0].device
    decay, beta1, beta2, epsilon = numbers
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    scalars = (decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2, epsilon)
    arguments = (table, len(weights), table if clip is None else clip, *scalars, kinds, ROWS, WIDTH)
    with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
        adamw_kernel[(blocks,)](*arguments, **OPTIONS)


def describe(
    lists: Sequence[Sequence[Tensor]],
    rates: Sequence[float],
    keys: Sequence[int],
    flags: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[int | bool, ...], int]:
    """The table on the CPU, what the compiler must know, and the number of blocks.

    ``flags``: stochastic, zero_grad, clipped. The kinds: aligned to 16 bytes, bf16 weights, bf16 gradients, moments,
    master, average, then the flags.
    """
    weights, grads, exp_avgs, exp_avg_sqs, scales, masters, averages = lists
    count = len(weights)
    sizes = [weight.numel() for weight in weights]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // BLOCK))
    none = [0] * count
    of_scales = [scale.data_ptr() for scale in scales] or none * 2
    addresses = [
        [t.data_ptr() for t in part] or none for part in (weights, grads, exp_avgs, exp_avg_sqs)
    ]
    addresses += [of_scales[:count], of_scales[count:]]
    addresses += [[t.data_ptr() for t in part] or none for part in (masters, averages)]
    aligned = all(place % 16 == 0 for part in (0, 1, 2, 3, 6, 7) for place in addresses[part])
    kinds = (
        aligned,
        weights[0].dtype == torch.bfloat16,
        grads[0].dtype == torch.bfloat16,
        MOMENTS[exp_avgs[0].dtype],
        MASTERS[masters[0].dtype] if masters else 0,
        bool(averages),
        *flags,
    )
    floats = [
        [struct.unpack("i", struct.pack("f", rate))[0] for rate in rates[k::3]] for k in range(3)
    ]
    rows = [starts[:-1], sizes, *addresses, list(keys), *floats]
    return (
        torch.tensor([number for row in rows for number in row], dtype=torch.int64),
        kinds,
        starts[-1],
    )
