"""The loss's Triton kernels: interpreted on the CPU, and compiled for GPUs that are not here."""

import os

import pytest
from support.gpu.triton_interp import run_interpreted

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from support.gpu.code import compile_launch
from support.gpu.launches_cross_entropy import launches


def test_the_kernels_in_the_interpreter():
    run_interpreted("interpreted_cross_entropy.py")


@pytest.mark.parametrize("launch", launches(), ids=lambda launch: launch.name)
def test_logits_are_read_in_vectors_and_nothing_spills(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for architecture in (90, "gfx942"):
        code = compile_launch(launch.kernel, launch.arguments, launch.options, architecture)
        assert code.spill_bytes == code.atomics == code.tf32 == 0
        wide = r"LDG\.\S*(128|64)" if architecture == 90 else "(global|buffer)_load_dwordx[24]"
        assert code.count(wide) > 0
