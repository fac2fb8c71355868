"""The simulation of bench/scaling against sums by hand."""

import random

import pytest

from bench.scaling.measured import shares
from bench.scaling.simulate import PAPER_S, ROWS, Cluster, by_units, synchronous, table
from merit_fast.manifests.ledger import read_ledger


def test_one_host_takes_the_papers_time_and_n_hosts_without_a_network_the_nth_part():
    assert Cluster(1, 1e9).training_s(ROWS, 1) == pytest.approx(PAPER_S)
    assert Cluster(8, 1e30).training_s(ROWS, 8) == pytest.approx(PAPER_S / 8)
    assert Cluster(8, 1e30, 70e9).training_s(ROWS, 8) == pytest.approx(10 * PAPER_S / 8)


def test_a_slow_network_delays_synchronous_training_only():
    slow = Cluster(8, 1.25e9)
    step = 128 * PAPER_S / ROWS / 8
    reduce = 2 * 7 / 8 * 14e9 / 1.25e9
    expected = ROWS / 128 * (step + reduce - step * 2 / 3)
    assert slow.training_s(ROWS, 8) == pytest.approx(expected)
    outcome = by_units(slow, random.Random(0))
    assert outcome.hours == pytest.approx(by_units(Cluster(8, 50e9), random.Random(0)).hours)
    assert outcome.hours < synchronous(slow, random.Random(0)).hours / 3


def test_deaths_cost_time_and_the_table_has_no_other_figures():
    rows = table(draws=3)
    assert len(rows) == 24
    for row in rows:
        assert row["units_with_deaths_h"] >= row["units_h"]
        assert row["synchronous_with_deaths_h"] >= row["synchronous_h"]
        assert 0 < row["overhead_of_40_examples"] < row["overhead"] < 0.1


def test_the_overhead_of_a_run_is_read_from_its_ledger(finished_run_ledger):
    found = shares(finished_run_ledger)
    parts = found["sketch_s"] + found["split_s"] + found["merge_s"]
    assert found["overhead"] == pytest.approx(parts / found["training_s"])


@pytest.fixture
def finished_run_ledger(tmp_path):
    """A ledger with round seconds."""
    from merit_fast.manifests.io import write_manifest
    from merit_fast.manifests.ledger import Ledger, OutputRecord

    def record(seconds):
        return OutputRecord("stage", "f", {}, {}, {}, seconds, {})

    names = {"sketch": 2.0, "split": 0.5, "branches/merit-0": 10.0, "branches/merit-1": 15.0}
    outputs = {name: record(seconds) for name, seconds in {**names, "merged/merit": 1.0}.items()}
    branches = {"merit": (("merit-0", "f"), ("merit-1", "f"))}
    write_manifest(Ledger(branches=branches, outputs=outputs), tmp_path / "run.json")
    return read_ledger(tmp_path)
