"""The sdist holds the repository; the wheel holds the package and works away from it."""

import json
import os
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

import merit_fast

CHECKS = ROOT / "tests" / "support" / "installed.py"
FOLDERS = ("merit_fast", "kernels", "csrc", "bench", "tests", "docs", "examples")
TOP = ("setup.py", "pyproject.toml", "constraints.txt", "Makefile", "mkdocs.yml", "CITATION.cff")
BUILT = {".so", ".pyc"}

pytestmark = [pytest.mark.slow, pytest.mark.compile, pytest.mark.process]


def run(*command, cwd, **environment):
    """Output of a command that sees neither the repository nor its PYTHONPATH."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "-q", "egg_info", "-e", folder, "sdist", "-d", folder, cwd=ROOT)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """A wheel with the native module, built from the sdist as an installer builds it, but for -O1.

    The last -O counts; with -O1 the compiler takes a third of the time.
    """
    folder = tmp_path_factory.mktemp("wheel")
    compiler = tmp_path_factory.mktemp("compiler") / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O1\n')
    compiler.chmod(0o755)
    chosen = {"CC": str(compiler), "CXX": str(compiler), "MERIT_FAST_NO_NATIVE": ""}
    options = ("-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, sdist, cwd=folder, **chosen)
    return next(folder.glob("*.whl"))


def repository_files():
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix not in BUILT and "__pycache__" not in file.parts:
                yield str(file.relative_to(ROOT))


def test_the_sdist_holds_the_repository_and_its_links(sdist):
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert not set(repository_files()) - members.keys()
    assert set(TOP) <= members.keys()
    assert members["merit_fast/kernels"].linkname == "../kernels"
    packed_twice = [name for name in members if name.startswith("merit_fast/kernels/")]
    assert not packed_twice
    assert not [name for name in members if Path(name).suffix in BUILT]
    assert {name.split("/")[0] for name in members}.isdisjoint({".venv", "build", "dist"})


def test_the_wheel_holds_the_package_and_its_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [file for file in repository_files() if file.split("/")[0] in ("merit_fast", "kernels")]
    inside = {file if file.startswith("merit_fast/") else f"merit_fast/{file}" for file in files}
    missing = inside - names
    assert not missing
    assert "merit_fast/py.typed" in names
    top = {name.split("/")[0] for name in names}
    assert top == {"merit_fast", f"merit_fast-{merit_fast.__version__}.dist-info"}
    assert "merit_fast/_C.abi3.so" in names or sys.version_info < (3, 12)
    abi = "cp312-abi3" if sys.version_info >= (3, 12) else "cp311-cp311"
    assert abi in wheel.name


def test_an_installed_wheel_runs_doctor_and_merges_away_from_the_repository(wheel, tmp_path):
    target = tmp_path / "site"
    options = ("-q", "--no-deps", "--no-index", "--target", target)
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=tmp_path)
    # -S leaves out site-packages and its .pth files, so the editable install of the repository;
    # as entries of PYTHONPATH the folders give the dependencies only.
    paths = os.pathsep.join([str(target), *site.getsitepackages()])
    models = tmp_path / "models"
    output = run(sys.executable, "-S", CHECKS, models, cwd=tmp_path, PYTHONPATH=paths)
    installed = json.loads(output)
    assert Path(installed["package"]) == target / "merit_fast"
    assert installed["version"] == merit_fast.__version__
    assert installed["native"]["built"]
