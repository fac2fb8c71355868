"""A requested backend runs or gives the reason; only the automatic choice falls back."""

import pytest
import torch
from support.checks import run_at_level

from merit_fast.errors import BackendUnavailableError
from merit_fast.kernels import dispatch
from merit_fast.kernels.sketch import CountSketch, flat_sketch


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(dispatch, "native_module", lambda: None)


def test_order_is_argument_then_environment_then_device(monkeypatch):
    assert dispatch.choose("flat_sketch", "cpu", None) == "cpu"
    monkeypatch.setenv("MERIT_FAST_BACKEND", "eager")
    assert dispatch.choose("flat_sketch", "cpu", None) == "eager"
    assert dispatch.choose("flat_sketch", "cpu", "cpu") == "cpu"


@pytest.mark.parametrize("backend", ["triton", "cuda", "cpuu"])
def test_a_backend_asked_for_never_falls_back(backend):
    with pytest.raises(BackendUnavailableError, match=f"flat_sketch: backend '{backend}'"):
        flat_sketch(torch.zeros(1, 1, 16), "w", CountSketch(4096), backend=backend)


def test_without_the_native_module_the_choice_is_eager_and_cpu_says_why(no_native, caplog):
    dispatch._log_fallback.cache_clear()
    assert dispatch.choose("flat_sketch", "cpu", None) == "eager"
    assert "install a C++ compiler" in caplog.text
    with pytest.raises(BackendUnavailableError, match="was not built: install a C\\+\\+ compiler"):
        dispatch.choose("flat_sketch", "cpu", "cpu")


def test_without_the_native_module_native_raises(no_native):
    with pytest.raises(BackendUnavailableError, match="merit_fast._C was not built"):
        dispatch.native()


def test_the_native_modules_structs_and_functions_take_names_only():
    native = dispatch.native()
    with pytest.raises(TypeError):
        native.SketchMatrix(0, False, 64, 64)
    with pytest.raises(TypeError):
        native.square_sum([], [], False, 1)
    assert native.square_sum(data=[], sizes=[], bf16=False, threads=1) == 0.0


def test_doctor_table_shows_choice_and_reasons(no_native):
    rows = {row["op"]: row for row in dispatch.backend_table()}
    assert rows.keys() == dispatch.OPS.keys()
    assert rows["flat_sketch"]["backend"] == "eager"
    assert "compiler" in rows["flat_sketch"]["unavailable"]["cpu"]


def test_a_forced_isa_level_that_is_unknown_is_an_error():
    import os
    import subprocess
    import sys

    environment = {**os.environ, "MERIT_FAST_SIMD": "avx9000"}
    script = "import merit_fast._C"
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0 and "MERIT_FAST_SIMD=avx9000" in result.stderr


def test_a_forced_isa_level_is_taken(native_levels):
    script = "import merit_fast._C as c; print(c.simd_level())"
    assert [run_at_level(script, level) for level in native_levels] == native_levels
