"""The command that axolotl's command line gets: every word goes to merit-fast."""

import subprocess
import sys
import tomllib

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.process


def run(*words):
    """Runs the command that pyproject.toml registers, as click runs it."""
    pytest.importorskip("click", reason="click is not installed")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["axolotl.cli_commands"]["merit-fast"].split(":")
    script = f"from {module} import {name}; {name}()"
    command = [sys.executable, "-c", script, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_words_output_and_exit_code_are_those_of_merit_fast(tmp_path):
    assert "merit-fast 0." in run("--version").stdout
    shown = run("merge", "--help")
    assert shown.returncode == 0 and "--weights" in shown.stdout
    refused = run("merge", str(tmp_path / "out"), "--model", str(tmp_path / "absent"))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ") and "absent" in refused.stderr
