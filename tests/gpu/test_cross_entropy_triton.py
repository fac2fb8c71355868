"""The Triton kernels of linear + cross-entropy, compiled for GPUs that this machine lacks."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from support.gpu.code import compile_launch
from support.gpu.launches_cross_entropy import launches

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("launch", launches(), ids=lambda launch: launch.name)
def test_logits_are_read_in_vectors_and_nothing_spills(launch):
    for architecture in (90, "gfx942"):
        code = compile_launch(launch.kernel, launch.arguments, launch.options, architecture)
        assert code.spill_bytes == code.atomics == code.tf32 == 0
        wide = r"LDG\.\S*(128|64)" if architecture == 90 else "(global|buffer)_load_dwordx[24]"
        assert code.count(wide) > 0
