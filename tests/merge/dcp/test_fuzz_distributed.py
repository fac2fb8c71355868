"""Damaged distributed checkpoints are refused on one line, or read as torch reads them."""

import random

import pytest
from support.merge.dcp import fuzz


@pytest.mark.parametrize("seed", range(2))
def test_damage_is_refused_or_read_as_torch_reads_it(tmp_path, seed):
    counts = fuzz.fuzz(tmp_path, random.Random(seed), 150, 20)
    assert counts["refused"] > 20 and counts["agrees"] > 0


def test_the_seed_itself_agrees(tmp_path):
    fuzz.write_seed(tmp_path / "seed")
    assert fuzz.check(tmp_path / "seed") == "agrees"
