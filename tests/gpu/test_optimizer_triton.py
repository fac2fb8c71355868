"""AdamW's Triton kernel, compiled for GPUs that this machine lacks."""

import os
from dataclasses import replace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from support.gpu.code import compile_launch
from support.gpu.gate import figures_of
from support.gpu.launches_optimizer import BF16, F32, launch, launches

pytestmark = pytest.mark.compile


def code(asked, architecture):
    measured = compile_launch(asked.kernel, asked.arguments, asked.options, architecture)
    assert measured.spill_bytes == measured.atomics == measured.tf32 == 0, (
        asked.name,
        architecture,
        measured.spill_bytes,
    )
    return measured


def row(asked, architecture):
    figures = figures_of(asked, architecture)
    assert figures["spill_bytes"] == figures["atomics"] == figures["tf32"] == 0, asked.name
    return figures


@pytest.mark.parametrize("asked", launches(), ids=lambda asked: asked.name)
def test_every_kind_compiles_without_spills(asked):
    assert row(asked, 90)["registers"] <= 128


@pytest.mark.parametrize("architecture", [80, 100, "gfx942"])
def test_other_makers_and_generations(architecture):
    row(launch("AdamW", BF16, shift=1), architecture)


@pytest.mark.parametrize("dtype,loads,stores", [(BF16, 2, 2), (F32, 4, 3)], ids=str)
def test_float32_is_moved_in_vectors_where_it_lies_on_16_bytes(dtype, loads, stores):
    aligned, shifted = (row(launch("AdamW", dtype, shift=shift), 90) for shift in (0, 1))
    assert shifted["wide_loads"] == shifted["wide_stores"] == 0
    assert aligned["wide_loads"] >= loads and aligned["wide_stores"] >= stores


def test_another_rate_or_step_is_no_other_kernel():
    """Numbers that change from step to step are arguments, never part of the code."""
    asked = launch("AdamW", F32)
    others = asked.arguments[:3] + (0.5, 0.25, 0.75, 0.1, 0.9, 1.0) + asked.arguments[9:]
    bodies = {
        code(replace(asked, arguments=a), 90).ptx.split(".section")[0]
        for a in (asked.arguments, others)
    }
    assert len(bodies) == 1
