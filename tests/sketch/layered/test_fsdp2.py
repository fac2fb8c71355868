"""Sketches of a model that FSDP2 or tensor parallelism divides among processes."""

import pytest
from support.paths import TESTS
from support.warm import run_together

pytestmark = pytest.mark.process
RANK = (
    f"import runpy, sys; sys.path.insert(0, {str(TESTS)!r});"
    "runpy.run_module('support.sketch.ranks', run_name='__main__', alter_sys=True)"
)


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(["equal_bits"], id="bits-and-sums-of-whole-models"),
        pytest.param(["slow", "wrong_formula"], id="processes-agree-on-what-taps-cannot-sketch"),
        pytest.param(["tensor_parallel"], id="slices-of-tensor-parallelism-add-up"),
    ],
)
def test_two_processes(tmp_path, cases):
    commands = [["-c", RANK, str(rank), "2", str(tmp_path), *cases] for rank in range(2)]
    results = run_together(commands, timeout=240)
    assert [result.returncode for result in results] == [0, 0], results
