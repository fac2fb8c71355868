"""The package in Python and notebooks: its public names, their help, errors of one line."""

import os
import pydoc
import re
import subprocess
import sys

import pytest

import merit_fast
from merit_fast.errors import InputError


def test_dir_lists_public_names_only():
    names = dir(merit_fast)
    assert set(merit_fast.__all__) <= set(names)
    assert {"load_merged", "merge_models", "patch_model", "run", "sketch_gradients"} <= set(names)
    assert not {"os", "Any", "importlib", "errors", "TYPE_CHECKING"} & set(names)
    for name in names:
        assert getattr(merit_fast, name) is not None
    for name in merit_fast.__all__:
        assert name == "__version__" or getattr(merit_fast, name).__doc__, name


def test_help_shows_every_public_function_with_its_text():
    text = pydoc.plain(pydoc.render_doc(merit_fast))
    for name in ("load_merged", "merge_models", "patch_model", "run", "sketch_gradients"):
        assert re.search(rf"^    {name}\(", text, re.MULTILINE), name
    assert "Brings every stage of a run's YAML up to date" in text


def test_modules_are_imported_when_they_are_used():
    code = (
        "import sys, merit_fast\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "dir(merit_fast)\n"
        "assert 'numpy' not in sys.modules\n"
        "assert merit_fast.merge.MergeConfig().method == 'linear'\n"
        "assert 'torch' not in sys.modules\n"
        "assert merit_fast.errors.InputError is merit_fast.InputError\n"
        "assert not hasattr(merit_fast, 'no_such_name')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = merit_fast.no_such_name


def test_bad_input_is_an_exception_of_one_line(tmp_path):
    (tmp_path / "my.yml").write_text("model: m\nmixtur: []\n")
    with pytest.raises(ValueError, match="mixtur: unknown key; did you mean mixture") as error:
        merit_fast.run(tmp_path / "my.yml")
    assert "\n" not in str(error.value)
    assert error.value._render_traceback_() == [f"InputError: {error.value}"]
    calls = [
        lambda: merit_fast.run("nowhere.yml"),
        lambda: merit_fast.load_merged(["nowhere"], "uniform"),
        lambda: merit_fast.merge_models(["nowhere"], "uniform", out=tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value).startswith("nowhere") and "\n" not in str(error.value)
