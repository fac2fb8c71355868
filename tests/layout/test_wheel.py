"""The wheel carries every file, and an install needs no compiler."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT, package_files


@pytest.mark.process
def test_a_wheel_carries_every_file_and_builds_without_a_compiler(tmp_path):
    environment = {**os.environ, "MERIT_FAST_NO_NATIVE": "1"}
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        str(ROOT),
        "-w",
        tmp_path,
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for file in package_files():
        inside = file.relative_to(ROOT)
        inside = Path("merit_fast") / inside if inside.parts[0] == "kernels" else inside
        assert str(inside) in names, inside
    assert {"merit_fast/report/page.html.j2", "merit_fast/evaluate/general_text.txt"} <= names
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)


@pytest.mark.process
def test_a_failing_compiler_is_said_and_does_not_fail_the_install(tmp_path):
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    command = [
        sys.executable,
        str(ROOT / "setup.py"),
        "build_ext",
        "--build-lib",
        tmp_path,
        "--build-temp",
        tmp_path,
    ]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (
        "the native CPU kernels were NOT built" in result.stderr
        and "merit-fast doctor" in result.stderr
    )
    assert not list(tmp_path.rglob("_C*.so"))
