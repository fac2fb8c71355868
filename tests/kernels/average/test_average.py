"""The weighted average: fp64 sums in order, rounded once, same bits on all backends and levels."""

import numpy as np
import pytest
from support.checks import run_at_level

from merit_fast.kernels.average import FLOAT_DTYPES, average_arrays
from merit_fast.kernels.average._eager import float64_to_bf16, to_float64

WEIGHTS = [0.1, 0.2, 0.3, 0.4]


def every_bf16():
    return np.arange(65536, dtype=np.uint16)


def adversarial(dtype, seed, n=5003):
    """Random bit patterns: denormals, signed zeros, infinities and NaN among them."""
    width = np.dtype(FLOAT_DTYPES[dtype][1]).itemsize
    return (
        np.random.default_rng(seed)
        .integers(0, 256, n * width)
        .astype(np.uint8)
        .view(FLOAT_DTYPES[dtype][1])
    )


@pytest.mark.parametrize("out_dtype", FLOAT_DTYPES)
def test_native_equals_eager_bit_for_bit_on_mixed_types(out_dtype):
    dtypes = list(FLOAT_DTYPES)
    inputs = [adversarial(dtype, seed) for seed, dtype in enumerate(dtypes)]
    with np.errstate(all="ignore"):
        results = [
            average_arrays(inputs, WEIGHTS, dtypes=dtypes, out_dtype=out_dtype, backend=backend)
            for backend in ("cpu", "eager")
        ]
    assert results[0].tobytes() == results[1].tobytes()


@pytest.mark.parametrize("n", [1, 7, 8, 4096, 5003])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_native_equals_eager_bit_for_bit_on_bf16_only(count, n):
    inputs = [adversarial("BF16", seed)[:n] for seed in range(count)]
    dtypes = ["BF16"] * count
    weights = [1 / (k + 2.5) for k in range(count)]
    results = [
        average_arrays(inputs, weights, dtypes=dtypes, out_dtype="BF16", backend=backend)
        for backend in ("cpu", "eager")
    ]
    assert results[0].tobytes() == results[1].tobytes()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_one_input_of_weight_one_comes_back_bit_for_bit(backend):
    bits = every_bf16()
    finite_or_infinite = (bits & 0x7FFF) <= 0x7F80
    out = average_arrays([bits], [1.0], dtypes=["BF16"], out_dtype="BF16", backend=backend)
    assert np.array_equal(
        out[finite_or_infinite], bits[finite_or_infinite]
    )  # denormals and -0.0 too
    assert ((out[~finite_or_infinite] & 0x7FFF) > 0x7F80).all()  # NaN stays NaN
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    out = average_arrays([halves], [1.0], dtypes=["F16"], out_dtype="F16", backend=backend)
    number = ~np.isnan(halves)
    assert np.array_equal(out.view(np.uint16)[number], halves.view(np.uint16)[number])


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_bf16_rounding_is_nearest_even_in_one_step(backend):
    """1 + 2^-8 is halfway between two bf16 numbers; a hair above, lost in fp32, must round up."""
    values = np.array(
        [1 + 2**-8, 1 + 2**-8 + 2**-40, 1 + 3 * 2**-8, 1 + 3 * 2**-8 - 2**-40, 2.0**-140, -0.0]
    )
    expected = np.array([1.0, 1 + 2**-7, 1 + 2**-6, 1 + 2**-7], np.float32)
    out = average_arrays([values], [1.0], dtypes=["F64"], out_dtype="BF16", backend=backend)
    assert out[:4].tolist() == (expected.view(np.uint32) >> 16).tolist()
    assert out[4] == 0  # 2^-140 is below half the smallest bf16 denormal 2^-133
    assert out[5] == 0x8000


def test_bf16_rounding_is_nearest_among_all_neighbours():
    values = np.random.default_rng(0).standard_normal(20000) * np.float64(
        10.0
    ) ** np.random.default_rng(1).integers(-39, 38, 20000)
    rounded = float64_to_bf16(values)
    here = np.abs(to_float64(rounded, "BF16") - values)
    magnitude = rounded & 0x7FFF
    for step in (-1, 1):
        near = np.clip(magnitude.astype(int) + step, 0, 0x7F7F).astype(np.uint16) | (
            rounded & 0x8000
        )
        assert (here <= np.abs(to_float64(near, "BF16") - values)).all()


def test_equal_inputs_average_to_themselves():
    bits = adversarial("BF16", 3)
    bits = bits[(bits & 0x7F80) != 0x7F80]
    out = average_arrays([bits] * 4, [0.25] * 4, dtypes=["BF16"] * 4, out_dtype="BF16")
    assert np.array_equal(out, bits)


ISA_SCRIPT = """
import hashlib, numpy as np
from merit_fast.kernels.average import FLOAT_DTYPES, average_arrays
digest = hashlib.sha256()
for out_dtype in FLOAT_DTYPES:
    inputs = []
    for k, (_, dtype) in enumerate(FLOAT_DTYPES.values()):
        raw = np.random.default_rng(k).integers(0, 256, 4099 * np.dtype(dtype).itemsize)
        inputs.append(raw.astype(np.uint8).view(dtype))
    options = {"dtypes": list(FLOAT_DTYPES), "out_dtype": out_dtype}
    digest.update(average_arrays(inputs, [.1, .2, .3, .4], **options).tobytes())
bf16 = [np.random.default_rng(k).integers(0, 65536, 4099).astype(np.uint16) for k in range(3)]
digest.update(average_arrays(bf16, [.2, .3, .5], dtypes=["BF16"] * 3, out_dtype="BF16").tobytes())
print(digest.hexdigest())
"""


def test_every_isa_level_gives_the_same_bits(native_levels):
    assert len({run_at_level(ISA_SCRIPT, level) for level in native_levels}) == 1


def test_out_may_be_an_input():
    a = np.arange(10, dtype=np.float32)
    b = np.ones(10, np.float32)
    out = average_arrays([a, b], [0.5, 0.5], dtypes=["F32", "F32"], out_dtype="F32", out=a)
    assert out is a and a.tolist() == [(i + 1) / 2 for i in range(10)]


def spread_bf16(rng, n, spread):
    """Random bf16 whose exponents differ by at most ``spread``, with zeros and every sign."""
    exponents = rng.integers(1, 255 - spread) + rng.integers(0, spread + 1, n)
    bits = (rng.integers(0, 2, n) << 15) | (exponents << 7) | rng.integers(0, 128, n)
    return np.where(rng.random(n) < 0.1, bits & 0x8000, bits).astype(np.uint16)


@pytest.mark.parametrize("count", range(2, 10))
@pytest.mark.parametrize("weight", [1.0, 0.5, 0.125, 2.0**-17, 2.0])
def test_equal_weights_that_are_a_power_of_two(count, weight):
    """Sums that are exact in fp32, nearly or not at all: as fp64 sums in order, rounded once."""
    rng = np.random.default_rng(count)
    parts = [[spread_bf16(rng, 97, s) for s in range(24)] for _ in range(count)]
    inputs = [np.concatenate([*part, adversarial("BF16", k)]) for k, part in enumerate(parts)]
    with np.errstate(all="ignore"):
        total = weight * to_float64(inputs[0], "BF16")
        for values in inputs[1:]:
            total = total + weight * to_float64(values, "BF16")
        wanted = float64_to_bf16(total)
    out = average_arrays(inputs, [weight] * count, dtypes=["BF16"] * count, out_dtype="BF16")
    nan = np.isnan(total)
    assert np.array_equal(out[~nan], wanted[~nan])
    assert (out[nan] == 0x7FC0).all()


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.1, 0.9], [0.3, 0.3]])
def test_out_may_be_a_bf16_input(weights):
    inputs = [adversarial("BF16", seed) for seed in (5, 6)]
    options = {"dtypes": ["BF16", "BF16"], "out_dtype": "BF16"}
    wanted = average_arrays(inputs, weights, **options)
    for k in (0, 1):
        copies = [values.copy() for values in inputs]
        out = average_arrays(copies, weights, out=copies[k], **options)
        assert out.tobytes() == wanted.tobytes()


def test_bad_arguments_are_named():
    x = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="as many inputs as weights"):
        average_arrays([x], [0.5, 0.5], dtypes=["F32"], out_dtype="F32")
    with pytest.raises(TypeError, match="a BF16 array must be stored as"):
        average_arrays([x], [1.0], dtypes=["BF16"], out_dtype="F32")
    with pytest.raises(TypeError, match="dtype must be one of"):
        average_arrays([x], [1.0], dtypes=["I8"], out_dtype="F32")
    with pytest.raises(ValueError, match="contiguous"):
        average_arrays([x, x[::2]], [0.5, 0.5], dtypes=["F32", "F32"], out_dtype="F32")
