"""Triton kernels compiled for absent GPUs fit, spill nothing and use the intended instructions."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from support.gpu.code import compile_launch

from merit_fast.kernels.average import _triton
from merit_fast.kernels.average._dtypes import DTYPES

pytestmark = pytest.mark.compile

ARCHITECTURES = [80, 90]
BF16, F16, F32, F64 = DTYPES


def compiled(columns, architecture):
    """Code of one launch over columns, each a list of dtypes (the result's last) and a shift."""
    tensors = [
        [torch.zeros(3000 + shift, dtype=d)[shift:] for d in dtypes] for dtypes, shift in columns
    ]
    count = len(columns[0][0]) - 1
    table, signatures, _ = _triton.describe(
        [(row[:-1], row[-1]) for row in tensors], [1 / count] * count
    )
    arguments = (table, len(columns), count, signatures, _triton.BLOCK)
    return compile_launch(_triton.average_kernel, arguments, _triton.OPTIONS, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "dtypes,registers",
    [
        ([BF16] * 5, 64),
        ([F16] * 5, 64),
        ([F32] * 5, 64),
        ([BF16] * 17, 80),
        ([F32] * 17, 80),
        ([F64] * 5, 96),
    ],
    ids=["bf16-4", "fp16-4", "fp32-4", "bf16-16", "fp32-16", "fp64-4"],
)
def test_the_average_fits_and_moves_128_bits_at_a_time(dtypes, registers, architecture):
    code = compiled([(dtypes, 0)], architecture)
    assert (
        code.registers <= registers
        and code.spill_bytes == code.stack_bytes == code.shared_bytes == 0
    )
    accesses = _triton.BLOCK * dtypes[0].itemsize // (16 * 32 * _triton.OPTIONS["num_warps"])
    assert code.count(r"LDG\.\S*128") == (len(dtypes) - 1) * accesses
    assert code.count(r"STG\.\S*128") == accesses


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_kinds_of_tensors_are_one_kernel_without_spills(architecture):
    kinds = [([BF16] * 5, 0), ([F32] * 5, 0), ([BF16, F16, F32, F64, BF16], 0), ([BF16] * 5, 1)]
    code = compiled(kinds, architecture)
    assert code.registers <= 128 and code.spill_bytes == 0
    assert (
        code.shared_bytes <= 8 * _triton.BLOCK
    )  # a thread's elements of one type are another's of the next


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_off_the_16_byte_grid_are_never_read_as_if_they_were_on_it(architecture):
    code = compiled([([BF16] * 5, 1)], architecture)
    elements = _triton.BLOCK // (32 * _triton.OPTIONS["num_warps"])
    assert code.count(r"LDG\.\S*U16") == 2 * 4 * elements  # one by one, with a mask and without
    assert code.count(r"STG\.\S*U16") == 2 * elements
    assert code.count(r"(LDG|STG)\.\S*128") == 0


@pytest.mark.parametrize("dtypes", [[BF16] * 5, [F32] * 5, [F64] * 5], ids=["bf16", "fp32", "fp64"])
def test_sums_keep_denormals_and_are_not_contracted(dtypes):
    """So that a GPU gives the bits that the interpreter gives."""
    ptx = compiled([(dtypes, 0)], 90).ptx
    assert "mul" in ptx and ".ftz" not in ptx and "fma" not in ptx
    assert ("mul.f64" in ptx or "mul.rn.f64" in ptx) == (F64 in dtypes)
