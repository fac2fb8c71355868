"""An install without the compiled kernels: one line, for commands that would run on them."""

import logging

import pytest

from merit_fast.cli.doctor import FIX
from merit_fast.kernels import dispatch


@pytest.fixture
def without_native(monkeypatch):
    """This process, as if merit_fast._C had not been built."""
    monkeypatch.setattr(dispatch, "native_module", lambda: None)
    dispatch._log_fallback.cache_clear()
    yield
    dispatch._log_fallback.cache_clear()
    for added in list(dispatch.logger().filters):
        dispatch.logger().removeFilter(added)


def test_a_merge_says_it_in_one_line_and_works(call, without_native, tiny_model, tmp_path, caplog):
    models = ["--model", f"{tiny_model}:1", "--model", f"{tiny_model}:3"]
    with caplog.at_level(logging.WARNING):
        code, out, err = call("merge", tmp_path / "out", *models)
    assert code == 0 and "done" in out
    assert [line for line in err.splitlines() if "note:" in line] == [
        "note: the compiled CPU kernels are not part of this install; everything runs, but "
        f"slower. To have them, {FIX}"
    ]
    assert not caplog.records
    dispatch.choose("adamw", "cpu", None)  # another op that falls back to eager adds no line
    assert not caplog.records


def test_doctor_shows_the_fix(call, without_native, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = call("doctor")
    assert code == 0 and f"native kernels: not built; {FIX}" in out and "note:" not in err


def test_an_install_with_kernels_says_nothing(call, tiny_model, tmp_path):
    code, _, err = call("merge", tmp_path / "out", "--model", f"{tiny_model}:1", "--dry-run")
    assert code == 0 and "note:" not in err
