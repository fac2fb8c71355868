"""Reads, rounds and writes the numbers of AdamW's Triton kernel, with the arithmetic of ``_eager``.

bf16 is read and written as its bits, so that rounding is ours. ``index`` is an element's number in
its tensor. ``inside`` is false past the tensor's end; ``FULL`` promises that no element is, and so
no mask splits 128-bit accesses into elements.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from merit_fast.kernels._tables import pointer_to

RANDOM_BLOCK = tl.constexpr(1024)  # elements whose random bits share a key


@triton.jit
def read(pointer, inside, FULL: tl.constexpr):
    return tl.load(pointer) if FULL else tl.load(pointer, mask=inside, other=0)


@triton.jit
def write(pointer, value, inside, FULL: tl.constexpr):
    if FULL:
        tl.store(pointer, value)
    else:
        tl.store(pointer, value, mask=inside)


@triton.jit
def _widened(bits):
    return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def load(address, index, inside, BF16: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    """float32 or bf16 elements as float32."""
    if BF16:
        return _widened(read(pointer_to(address, tl.int16, ALIGNED) + index, inside, FULL))
    return read(pointer_to(address, tl.float32, ALIGNED) + index, inside, FULL)


@triton.jit
def nearest_bits(value):
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)


@triton.jit
def with_random(value, random):
    """The bits plus ``random``, for sizes below bf16's largest."""
    bits = value.to(tl.uint32, bitcast=True)
    return bits + tl.where((bits & 0x7FFFFFFF) < 0x7F7F0000, random.to(tl.uint32), 0)


@triton.jit
def _stochastic_bits(value, random16):
    bits = value.to(tl.uint32, bitcast=True)
    cut = with_random(value, random16) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, cut)


@triton.jit
def store_bf16(
    address,
    index,
    inside,
    value,
    random16,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):
    """Rounds to bf16; returns the rounded values as float32."""
    bits = _stochastic_bits(value, random16) if STOCHASTIC else nearest_bits(value)
    bits = bits.to(tl.uint16)
    write(
        pointer_to(address, tl.int16, ALIGNED) + index,
        bits.to(tl.int16, bitcast=True),
        inside,
        FULL,
    )
    return _widened(bits)


@triton.jit
def _second_round(x):
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _mixed(x):
    """Wellons' lowbias32."""
    return _second_round((x ^ (x >> 16)) * 0x7FEB352D)


@triton.jit
def block_keys(block, key):
    """Keys of a block's weights and moments; int64 ``block`` and ``key``."""
    weight = _mixed((block & 0xFFFFFFFF).to(tl.uint32) ^ ((key >> 32) & 0xFFFFFFFF).to(tl.uint32))
    weight = _mixed(weight ^ (block >> 32).to(tl.uint32))
    return weight, _mixed(weight + 0x9E3779B9)


@triton.jit
def first_round(place, key):
    """Bits of an element's place in the parameter that all blocks share."""
    return _mixed((place & (RANDOM_BLOCK - 1)).to(tl.uint32) ^ (key & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def random_bits(shared, place, block, block_key, next_key):
    """Random bits of elements of ``block`` or the next one."""
    return _second_round(shared ^ tl.where(place // RANDOM_BLOCK == block, block_key, next_key))


@triton.jit
def load_codes(
    address, scale_address, index, row, inside, full_row,
    SECOND: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """8-bit moments as float32; ``SECOND``: second moments."""
    TYPE: tl.constexpr = tl.uint8 if SECOND else tl.int8
    STEPS: tl.constexpr = 255.0**2 if SECOND else 127.0
    code = read(pointer_to(address, TYPE, ALIGNED) + index, inside, FULL).to(tl.float32)
    scale = tl.load(pointer_to(scale_address, tl.float32, False) + row, mask=full_row, other=0.0)
    unit = tl.div_rn(tl.sqrt_rn(scale), tl.full(scale.shape, STEPS, tl.float32))
    root = (code * code if SECOND else code) * unit[:, None]
    return root * tl.abs(root)


@triton.jit
def code_shift(random):
    """The rounding of a code from the high 16 bits: odd multiples of 2^-17 in (-1/2, 1/2)."""
    bits = (random & 0xFFFF0000) | 0x8000
    return bits.to(tl.int32, bitcast=True).to(tl.float32) * (1.0 / 4294967296)


@triton.jit
def store_codes(
    address, scale_address, index, row, inside, full_row, value, shift,
    SECOND: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Writes codes and scales of moments, as ``_eager.encode`` does."""
    STEPS: tl.constexpr = 255.0 if SECOND else 127.0
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    size = bits.to(tl.float32, bitcast=True)
    top = tl.max(tl.where(inside, bits, 0), axis=1).to(tl.float32, bitcast=True)
    usable = (top >= 1.17549435e-38) & (top <= 3.40282347e38)
    divisor = tl.where(usable, top, 1.0)
    most = tl.full(top.shape, STEPS * STEPS, tl.float32)
    square = shift * shift - 0.25
    if SECOND:
        square = tl.sqrt_rn(size) * tl.div_rn(most, tl.sqrt_rn(divisor))[:, None] + 3.0 * square
    else:
        lift = tl.where(divisor < 2.0**-80, 2.0**64, 1.0)  # else the factor could be infinite
        square = size * lift[:, None] * tl.div_rn(most, divisor * lift)[:, None] + square
    root = tl.sqrt_rn(tl.where(square > 0, square, 0.0))
    code = ((root + shift) + 12582912.0) - 12582912.0  # the nearest whole number
    code = tl.where(code < STEPS, code, STEPS)
    if SECOND:
        code = tl.where((code == 0) & (size > 0), 1.0, code)
    else:
        code = tl.where(value < 0, -code, code)
    code = tl.where(usable[:, None], code, tl.where(top < 1, 0.0, STEPS)[:, None])
    TYPE: tl.constexpr = tl.uint8 if SECOND else tl.int8
    write(pointer_to(address, TYPE, ALIGNED) + index, code.to(tl.int32).to(TYPE), inside, FULL)
    tl.store(
        pointer_to(scale_address, tl.float32, False) + row,
        tl.where((top < 1) & (usable == 0), 0.0, top),
        mask=full_row,
    )


@triton.jit
def number_at(table, at):
    """A float32 that the table holds as bits."""
    return tl.load(table + at).to(tl.int32).to(tl.float32, bitcast=True)
