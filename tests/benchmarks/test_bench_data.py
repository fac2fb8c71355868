"""The benchmarks of data keep running, and measure what they say."""

import json
import os
import subprocess
import sys

import pytest
from support.paths import ROOT


def lines_of(*arguments):
    """The JSON lines that a benchmark prints."""
    process = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.process
def test_the_store_benchmark_measures_the_same_rows_three_times(tiny_model):
    found = lines_of("bench.data.store", "--model", tiny_model, "--rows", 40, "--words", 9)
    assert [line["mode"] for line in found] == ["plain", "build", "open"]
    assert {line["rows"] for line in found} == {40}
    assert len({line["tokens_per_row"] for line in found}) == 1


@pytest.mark.process
def test_the_large_store_is_read_whole():
    (line,) = lines_of("bench.data.store", "--large", 500)
    assert line["counts"] == [500, 500 * 300, 500 * 150]
    assert line["tokens_read"] == 500 * 300
