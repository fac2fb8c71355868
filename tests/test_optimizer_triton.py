"""AdamW's Triton kernel: interpreted on the CPU, and compiled for GPUs that are not here."""

import os

import pytest
from triton_interp import run_interpreted

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from gpu_code import WIDE_LOADS, WIDE_STORES, compile_launch
from gpu_launches_optimizer import BF16, F32, launch, launches


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def code(asked, architecture):
    found = compile_launch(asked.kernel, asked.arguments, asked.options, architecture)
    assert found.spill_bytes == found.atomics == found.tf32 == 0, (asked.name, architecture, found.spill_bytes)
    return found


def test_the_kernel_in_the_interpreter():
    run_interpreted("interpreted_optimizer.py")


@pytest.mark.parametrize("asked", launches(), ids=lambda asked: asked.name)
def test_every_kind_compiles_without_spills(asked):
    assert code(asked, 90).registers <= 128


@pytest.mark.parametrize("architecture", [80, 100, "gfx942"])
def test_other_makers_and_generations(architecture):
    code(launch("AdamW", BF16, shift=1), architecture)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_only_what_lies_on_16_bytes_may_be_read_in_vectors(dtype):
    aligned, shifted = (code(launch("AdamW", dtype, shift=shift), 90) for shift in (0, 1))
    assert shifted.count(WIDE_LOADS) == shifted.count(WIDE_STORES) == 0
    assert aligned.count(WIDE_LOADS) >= 6 and aligned.count(WIDE_STORES) >= 4


def test_no_product_and_sum_are_contracted():
    assert code(launch("AdamW", F32), 90).count("FFMA") == 0 or "div.rn" in code(launch("AdamW", F32), 90).ptx
