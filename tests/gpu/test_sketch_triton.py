"""The sketch's Triton kernels, compiled for GPUs that this machine lacks."""

import functools
import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from support.gpu.code import compile_launch
from support.gpu.gate import figures_of
from support.gpu.launches_sketch import BF16, COLUMNS, F32, KEY, launched, linear, rows

from merit_fast.kernels.sketch import _triton
from merit_fast.kernels.sketch._target import SketchTarget

pytestmark = pytest.mark.compile

OFF_GRID = (3, 5, 4096)  # a part that begins where no vector of 128 bits does
EVERY = pytest.mark.parametrize("architecture", [80, 90, 100, 120, "gfx942"])


def code(launch, architecture):
    measured = compile_launch(launch.kernel, launch.arguments, launch.options, architecture)
    assert measured.spill_bytes == measured.atomics == measured.tf32 == 0, (
        launch.name,
        architecture,
        measured.spill_bytes,
    )
    return measured


def row(launch, architecture):
    figures = figures_of(launch, architecture)
    assert figures["spill_bytes"] == figures["atomics"] == figures["tf32"] == 0, launch.name
    return figures


# Instructions of a warp for one step of the loop: 32 tokens, or 64 with operands in shared memory.
PRODUCTS = {
    80: ("HMMA", 16),
    90: ("HGMMA", 4),
    100: ("UTCHMMA", 8),
    120: ("HMMA", 16),
    "gfx942": ("v_mfma", 24),
}


@EVERY
def test_a_layer_in_bf16_is_taken_by_tensor_cores_from_loads_of_128_bits(architecture):
    layer = code(linear("layer", BF16), architecture)
    product, count = PRODUCTS[architecture]
    assert layer.count(product) == count
    assert layer.registers <= 184 and layer.shared_bytes <= 50 << 10
    if architecture == "gfx942":
        assert (
            layer.count("(global|buffer)_load") == layer.count("(global|buffer)_load_dwordx4") > 0
        )
        return
    assert layer.count("LDGSTS") == layer.count(r"LDGSTS\.\S*128") > 0  # dy and x, asynchronously
    assert (
        layer.count(r"LDG\.\S*128") == layer.count(r"STG\.\S*128") == layer.count("STG") == 8
    )  # the bucket
    assert layer.count(r"LDG\.") == 8 + 2  # and two offsets
    assert layer.count("SHFL") == 32  # the permutation of 64 x 64 floats by 128 threads
    if architecture != 100:  # only the finished bucket goes through shared memory
        assert layer.ptx.rfind("shfl.sync") < layer.ptx.find("st.shared")


@pytest.mark.parametrize("architecture", [80, 90])
def test_a_scale_is_read_in_vectors_too(architecture):
    layer = code(linear("layer", BF16, scaled=True), architecture)
    assert layer.registers <= 240 and layer.count(r"LDG\.\S*128") == 8 + 8


def test_rows_that_end_off_the_grid_are_padded_to_it():
    layer = code(linear("layer", BF16, columns=COLUMNS - 1, place=(0, 0, 50257)), 90)
    assert layer.count("LDGSTS") == layer.count(r"LDGSTS\.\S*128") > 0


@pytest.mark.parametrize("architecture", [90, "gfx942"])
def test_a_layer_in_fp32_is_taken_exactly(architecture):
    layer = code(linear("layer", F32), architecture)
    assert layer.registers <= 168
    assert (
        layer.count("HMMA|HGMMA|UTC") == 0
    )  # no rounding of inputs; CDNA's matrix cores take float32 as it is
    assert layer.count("FFMA" if architecture != "gfx942" else "v_mfma_f32_.*x.*_f32") > 0


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_parts_that_begin_off_the_grid_fit_too(dtype, architecture):
    layer = code(linear("layer", dtype, COLUMNS - 1, OFF_GRID, scaled=True), architecture)
    assert layer.registers <= 168 and layer.count(r"LDGSTS\.\S*128") == 0


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_rows_fit(dtype, by_id):
    figures = row(rows("rows", dtype, by_id, scaled=dtype == F32), 90)
    assert figures["registers"] <= 128 and figures["shared_bytes"] <= (16 << 10) * by_id
    assert (figures.get("WGMMA", 0) > 0) == (by_id and dtype == BF16)


def test_numbers_that_the_compiler_knows_to_be_one_compile():
    """Triton makes constants of integers that are 1: columns, strides, the first row and column."""
    values = torch.zeros(8, 1)
    ids = torch.zeros(8, dtype=torch.int64)
    offsets = torch.tensor([0, 4, 8])
    by_rows = SketchTarget(offsets, 1, 1, 2, KEY, torch.ones(4, 1), torch.zeros(2, 8192))
    whole = replace(by_rows, scale=torch.ones(1, 1))
    for kernel, call in (
        ("rows_kernel", lambda: _triton.sketch_rows(values, None, by_rows)),
        ("ids_kernel", lambda: _triton.sketch_rows(values, ids, by_rows)),
        ("linear_kernel", lambda: _triton.sketch_linear(values, values, whole)),
    ):
        row(launched(kernel, call, kernel), 90)


def test_another_key_or_batch_is_no_other_kernel():
    """Layers have keys of their own: the compiled code must not depend on them."""
    bodies = set()
    for key, batch, buckets in ((-(1 << 60), 2, 16), ((1 << 60) + 1, 3, 5)):
        values = torch.zeros(192, 256)
        offsets = torch.arange(batch + 1) * (192 // batch)
        target = SketchTarget(offsets, 0, 0, 256, key, None, torch.zeros(batch, buckets * 4096))
        call = functools.partial(_triton.sketch_rows, values, None, target)
        ptx = code(launched("rows", call, "rows_kernel"), 90).ptx
        bodies.add(ptx.split(".section")[0])
    assert len(bodies) == 1
