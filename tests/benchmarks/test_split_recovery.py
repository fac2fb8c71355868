"""The recovery study keeps running, and what it judges by is right."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support.paths import ROOT

from bench.split import planted
from bench.split.recovery import METHODS
from merit_fast.split.conflict import cosine_matrix


@pytest.mark.process
def test_quick_mode_ends_with_one_json_object():
    command = [sys.executable, "-m", "bench.split.recovery", "--quick", "--json"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # small matrices: more threads only wait for each other
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert set(result) == {*METHODS, "debiased_slope", "verdict_accuracy"}
    for method in METHODS:
        assert set(result[method]) == {"2", "4", "8"}
    assert all(
        share <= 1 + 1e-6
        for method in ("pca-swap", "anti", "iid")
        for share in result[method].values()
    )
    for groups in "248":
        assert result["pca-swap"][groups] > max(
            0.9, result["random"][groups], result["anti"][groups]
        )
        assert result["iid"][groups] == pytest.approx(0, abs=1e-6)
    assert result["debiased_slope"] == pytest.approx(1, abs=0.1)
    assert "| pca-swap | 20-1000 | " in process.stdout


def test_without_conflicts_all_datasets_have_the_same_cosine():
    mixture = planted.plant(np.random.default_rng(0), 10, (0.0, 0.0, 0.0))
    cosine = cosine_matrix(mixture.means)[np.triu_indices(10, 1)]
    assert np.allclose(cosine, cosine[0]) and cosine[0] > 0.1


@pytest.mark.parametrize("groups", [2, 3])
def test_the_optimum_over_all_splits_is_one_of_theirs(groups):
    mixture = planted.plant(np.random.default_rng(1), 7)
    best = planted.best_of_all(mixture, groups)
    gains = []
    for code in range(groups**7):
        labels = [code // groups**i % groups for i in range(7)]
        if len(set(labels)) == groups:
            off = max(
                abs(mixture.weights[np.array(labels) == k].sum() - 1 / groups)
                for k in range(groups)
            )
            gains.append((off, mixture.gain(labels)))
    least = max(0.05 / groups, min(off for off, _ in gains))
    assert best == pytest.approx(max(gain for off, gain in gains if off <= least + 1e-9))


def test_noise_of_the_block_sums_is_as_large_as_said():
    generator = np.random.default_rng(2)
    mixture = planted.plant(generator, 6)
    products = planted.observe(mixture, generator, 100, 100)
    excess = np.diag(products.total) / 100**2 - (mixture.means**2).sum(1)
    expected = mixture.noise * (mixture.means**2).sum(1) / 100
    assert excess == pytest.approx(expected, rel=0.35)
