"""The Triton kernels in Triton's interpreter, on the CPU: the files interpreted_*.py.

Interpreted and compiled kernels cannot live in one process, so one other process runs all files.
"""

import os
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.gpu.triton_interp import run_interpreted
from support.paths import TESTS

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("kernels are interpreted in another process", allow_module_level=True)

FILES = sorted(file.stem for file in (TESTS / "gpu" / "interpreted").glob("interpreted_*.py"))
pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> tuple[dict[str, Counter], str]:
    """File -> number of tests by outcome, and all that pytest printed."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    printed = run_interpreted(report)
    counts = {file: Counter() for file in FILES}
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        file = case.get("classname").rpartition(".")[2]
        counts[file][outcomes[0] if outcomes else "passed"] += 1
    return counts, printed


@pytest.mark.parametrize("file", FILES)
def test_the_kernels_in_the_interpreter(file, outcome):
    counts, printed = outcome
    assert set(counts[file]) == {"passed"} and counts[file]["passed"] > 2, printed


def test_every_family_of_kernels_is_interpreted():
    families = {Path(file).parent.name for file in (TESTS.parent / "kernels").glob("*/_triton.py")}
    subjects = [file.removeprefix("interpreted_") for file in FILES]
    of_files = [{family for family in families if name.startswith(family)} for name in subjects]
    assert all(len(of_file) == 1 for of_file in of_files)
    assert set().union(*of_files) == families
