"""The layers' Triton kernels, compiled for GPUs that this machine lacks."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from support.gpu.code import compile_launch
from support.gpu.gate import figures_of
from support.gpu.launches_layers import BF16, F32, geglu_by_erf, heads, norm, ones, pair

from merit_fast.kernels.layers import geglu, swiglu

pytestmark = pytest.mark.compile

EVERY = pytest.mark.parametrize("architecture", [80, 90, 100, 120, "gfx942"])


def rows(launches, architecture):
    """Figures of launches, none of which spills, uses atomics or rounds to tf32."""
    rows = [figures_of(launch, architecture) for launch in launches]
    for launch, row in zip(launches, rows, strict=True):
        assert row["spill_bytes"] == row["atomics"] == row["tf32"] == 0, (launch.name, row)
    return rows


@EVERY
@pytest.mark.parametrize("columns", [128, 4096, 16384])
def test_rows_stay_in_registers(columns, architecture):
    for row in rows(norm("norm", F32, columns), architecture):
        assert row["registers"] <= 128 and row["shared_bytes"] <= 16 << 10


@pytest.mark.parametrize("architecture", [80, 90])
def test_whole_tiles_are_moved_in_vectors(architecture):
    norms = norm("norm", BF16, 4096)
    gates = pair("swiglu", swiglu, [(8, 11264)] * 2)
    for forward, loads in ((norms[0], 1), (gates[0], 2)):
        code = compile_launch(forward.kernel, forward.arguments, forward.options, architecture)
        assert code.spill_bytes == code.atomics == code.tf32 == 0
        assert code.count(r"LDG\.\S*(64|128)") >= loads and code.count(r"STG\.\S*(64|128)") >= 1


@EVERY
def test_no_activation_calls_a_function(architecture):
    for function in (geglu, geglu_by_erf):
        launches = pair("geglu", function, [(8, 4096)] * 2)
        for row in rows(launches, architecture):
            assert row["stack_bytes"] == 0 and row["registers"] <= 64


@EVERY
def test_heads_that_fill_no_tile_fit_too(architecture):
    for row in rows(heads("rope", BF16, 80, 20), architecture):
        assert row["registers"] <= 128


def test_numbers_that_the_compiler_knows_to_be_one_compile():
    """Triton makes constants of integers that are 1: rows, columns, strides, heads, tokens."""
    rows(ones(), 90)
