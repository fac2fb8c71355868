"""FusedAdamW in several processes over gloo: ``support.kernels.ranks`` has the checks."""

import os
import subprocess
import sys

import pytest
from support.kernels.ranks.checks import CHECKS
from support.paths import ROOT

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The folder of outcomes of all checks, which run one after another in the same ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.run(
        [sys.executable, "-m", "support.kernels.ranks", str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.mark.parametrize(
    "ranks,name", [(ranks, name) for ranks, checks in CHECKS.items() for name in checks]
)
def test_several_ranks(outcomes, ranks, name):
    failures = (outcomes / f"{ranks}.{name}").read_text()
    assert not failures, failures
