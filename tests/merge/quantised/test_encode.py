"""Values become the nearest codes with fresh scales, in C++ as in the NumPy reference."""

import numpy as np
import pytest
import torch

from merit_fast.merge.engine.decode import code_values
from merit_fast.merge.engine.quantise.encode import (
    block_sizes,
    encode_rows,
    raise_sizes,
    round_scales,
)
from merit_fast.merge.engine.quantise.encoding import Encoding

KINDS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def encoding(kind, rows, columns, block, dtype="F32"):
    return Encoding(kind, rows, columns, *block, "s", dtype, ())


def spread_values(rows, columns):
    """Values of all sizes, some of them zero, NaN or infinite."""
    rng = np.random.default_rng(rows)
    values = rng.standard_normal((rows, columns)) * 2.0 ** rng.integers(-30, 30, (rows, columns))
    values[rng.random((rows, columns)) < 0.1] = 0.0
    values.flat[3], values.flat[7], values.flat[11] = np.nan, np.inf, -np.inf
    return values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("native", [False, True])
def test_codes_are_torchs_own_casts(kind, native):
    """Every code, every middle between two codes, and the floats around both."""
    table = np.unique(code_values(kind)[np.isfinite(code_values(kind))])
    middles = (table[1:] + table[:-1]) / 2
    exact = np.concatenate([table, middles]).astype(np.float32)
    values = np.concatenate(
        [exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))]
    )[None]
    form = encoding(kind, 1, values.size, (1, values.size))
    largest = form.largest
    values = np.clip(values, -largest, largest)
    codes, _ = encode_rows(values.astype(np.float64), np.ones((1, 1)), form, is_native=native)
    wanted = torch.from_numpy(values).to(KINDS[kind]).view(torch.uint8).numpy()
    is_zero = (codes | wanted) & 127 == 0
    np.testing.assert_array_equal(np.where(is_zero, 0, codes), np.where(is_zero, 0, wanted))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [(4, 6), (1, 32), (128, 128), (5, 1), (3, 70)])
def test_the_kernel_gives_the_bits_of_the_reference(kind, block):
    rows = 13
    columns = 70
    values = spread_values(rows, columns)
    form = encoding(kind, rows, columns, block)
    sizes = np.zeros(form.grid)
    raise_sizes(values, form, sizes, True)
    np.testing.assert_array_equal(sizes, block_sizes(values, form))
    scales, _ = round_scales(sizes, form)
    for first, count in ((0, rows), (2, 9), (12, 1)):
        part = np.ascontiguousarray(values[first : first + count])
        ours, errors = encode_rows(part, scales, form, first, is_native=True)
        theirs, known = encode_rows(part, scales, form, first)
        np.testing.assert_array_equal(ours, theirs)
        assert errors.elements == known.elements and errors.largest == known.largest
        np.testing.assert_allclose(errors.squares, known.squares, rtol=1e-12)
        np.testing.assert_allclose(errors.value_squares, known.value_squares, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F8_E8M0"])
def test_scales_reach_every_value_and_are_near(dtype):
    rng = np.random.default_rng(2)
    sizes = 448 * 2.0 ** rng.uniform(-8, 8, (50, 3))
    sizes[0, 0] = 0.0
    sizes[1, 1] = 448 * 2.0**-5
    form = encoding("F8_E4M3", 50, 3, (1, 1), dtype)
    scales, stored = round_scales(sizes, form)
    torch_dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    kind = torch_dtype.get(dtype, torch.float8_e8m0fnu)
    read = torch.frombuffer(bytearray(stored.tobytes()), dtype=kind).double().numpy()
    np.testing.assert_array_equal(read.reshape(scales.shape), scales)
    assert scales[0, 0] == 1.0 and scales[1, 1] == 2.0**-5
    exact = sizes / 448
    inside = sizes > 0
    most = {"F32": 2**-24, "BF16": 2**-7, "F16": 2**-10, "F8_E8M0": 1.0}[dtype]
    least = -(2**-24) if dtype == "F32" else 0.0
    off = scales[inside] / exact[inside] - 1
    assert (off >= least).all() and (off <= most).all()


def test_the_kernel_refuses_grids_that_are_too_small():
    form = encoding("F8_E4M3", 13, 70, (4, 6))
    values = np.zeros((13, 70))
    with pytest.raises(ValueError, match="a number for each block"):
        encode_rows(values, np.ones((3, 12)), form, is_native=True)
    with pytest.raises(ValueError, match="a number for each block"):
        raise_sizes(values, form, np.zeros((4, 11)), True)
