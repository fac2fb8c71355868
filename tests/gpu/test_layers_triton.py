"""The layers' Triton kernels, compiled for GPUs that this machine lacks."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from support.gpu.code import compile_launch
from support.gpu.launches_layers import BF16, F32, heads, norm, pair

from merit_fast.kernels.layers import geglu, swiglu

pytestmark = pytest.mark.compile

EVERY = pytest.mark.parametrize("architecture", [80, 90, 100, 120, "gfx942"])


def codes(launches, architecture):
    codes = [
        compile_launch(each.kernel, each.arguments, each.options, architecture) for each in launches
    ]
    for launch, code in zip(launches, codes, strict=True):
        assert code.spill_bytes == code.atomics == code.tf32 == 0, (
            launch.name,
            architecture,
            code.spill_bytes,
        )
    return codes


@EVERY
@pytest.mark.parametrize("columns", [128, 4096, 16384])
def test_rows_stay_in_registers(columns, architecture):
    for code in codes(norm("norm", F32, columns), architecture):
        assert code.registers <= 128 and code.shared_bytes <= 16 << 10


@pytest.mark.parametrize("architecture", [80, 90])
def test_whole_tiles_are_moved_in_vectors(architecture):
    norms = norm("norm", BF16, 4096)
    gates = pair("swiglu", swiglu, [(8, 11264)] * 2)
    for forward, loads in ((norms[0], 1), (gates[0], 2)):
        (code,) = codes([forward], architecture)
        assert code.count(r"LDG\.\S*(64|128)") >= loads and code.count(r"STG\.\S*(64|128)") >= 1


@EVERY
def test_no_activation_calls_a_function(architecture):
    for kind in ("tanh", "none"):
        launches = pair(
            "geglu", lambda g, u, kind=kind: geglu(g, u, approximate=kind), [(8, 4096)] * 2
        )
        for code in codes(launches, architecture):
            assert code.stack_bytes == 0 and code.registers <= 64


@EVERY
def test_heads_that_fill_no_tile_fit_too(architecture):
    for code in codes(heads("rope", BF16, 80, 20), architecture):
        assert code.registers <= 128


def test_numbers_that_the_compiler_knows_to_be_one_compile():
    """Triton makes constants of integers that are 1: rows, columns, strides, heads, tokens."""
    launches = [
        *norm("norm of one", F32, 1),
        *pair("one gate", swiglu, [(1, 1)] * 2),
        *pair("packed", swiglu, [(1, 2)]),
    ]
    codes([*launches, *heads("smallest", F32, 2, 2)], 90)
