"""The number of groups: as many as part conflicts on held-out blocks, with an explanation."""

import numpy as np
import pytest
from support.split.mixtures import choose, clusters, means_of

from merit_fast.split import SplitConfig
from merit_fast.split.auto import candidate_numbers
from merit_fast.split.search.problem import Pins


def numbers(count, cosine, **options):
    """K that is chosen in ``count`` draws, as a set."""
    found = set()
    for seed in range(count):
        generator = np.random.default_rng([seed, len(cosine)])
        means = means_of(cosine, generator)
        found.add(choose(means, 200, 20.0, generator, **options).num_groups)
    return found


@pytest.mark.parametrize(
    "sizes,within,across,expected",
    [
        ((2, 1), 0.5, -0.3, 2),
        ((2, 2), 0.5, -0.3, 2),
        ((3, 2), 0.5, -0.3, 2),
        ((4, 3), 0.5, -0.3, 2),
        ((4, 3), 0.1, -0.3, 2),
        ((8, 8), 0.5, -0.3, 2),
        ((3, 3, 3, 3), 0.5, -0.1, 4),
        ((3, 3, 3, 3), 0.5, -0.2, 4),
        ((8, 8, 8, 8), 0.5, -0.1, 4),
    ],
    ids=str,
)
def test_planted_clusters_that_conflict_are_counted(sizes, within, across, expected):
    assert numbers(3, clusters(sizes, within, across)) == {expected}


@pytest.mark.parametrize(
    "cosine",
    [clusters((32,), 0.5, 0.0), clusters((7,), 0.5, 0.0), clusters((8, 8), 0.3, 0.1), np.eye(7)],
    ids=["32 at +.5", "7 at +.5", "two clusters, both above 0", "7 orthogonal"],
)
def test_structure_without_conflict_makes_one_group(cosine):
    generator = np.random.default_rng(0)
    decision = choose(means_of(cosine, generator), 200, 20.0, generator)
    assert decision.num_groups == 1
    assert decision.reason == (
        "splitting would not help: no pair of datasets conflicts: no cosine of mean gradients is "
        "below zero by two standard errors"
    )


@pytest.mark.parametrize("planted,expected", [(0, 1), (1, 2), (2, 4)])
def test_planted_axes_are_counted(planted, expected):
    """No axis, one or two with two sides each; 24 datasets of 160 noisy examples."""
    generator = np.random.default_rng(planted)
    basis = np.linalg.qr(generator.standard_normal((300, 30)))[0].T
    sides = np.array([[(i >> axis & 1) * 2 - 1 for axis in range(2)] for i in range(24)])
    means = basis[:24] + 1.2 * (sides * (np.arange(2) < planted)) @ basis[24:26]
    decision = choose(means, 160, 40.0, generator)
    assert decision.num_groups == expected, decision.reason


@pytest.mark.parametrize("kind", ["no gradient", "orthogonal", "one gradient"])
def test_noise_is_not_split(kind):
    """At most one in a hundred; ``bench.split.auto`` draws as many."""
    for seed in range(8):
        generator = np.random.default_rng(seed)
        number = (7, 16)[seed % 2]
        cosine = np.ones((number, number)) if kind == "one gradient" else np.eye(number)
        means = means_of(cosine, generator) * (kind != "no gradient")
        decision = choose(means, int(generator.integers(16, 65)), 40.0, generator, spread=0.8)
        assert decision.num_groups == 1, decision.reason


def test_the_reason_and_the_rows_tell_what_was_measured():
    generator = np.random.default_rng(1)
    cosine = clusters((4, 3), 0.5, -0.3)
    decision = choose(means_of(cosine, generator), 200, 20.0, generator)
    two, three = decision.tried
    assert decision.reason.startswith("2 groups: on held-out blocks the pairs that it parts have")
    assert two.taken and not three.taken and (two.coarser, three.coarser) == (1, 2)
    assert two.whole.parted == pytest.approx(-0.3, abs=3 * two.whole.parted_error + 0.02)
    assert two.whole.kept == pytest.approx(0.5, abs=0.05)
    assert decision.separation is not None


def test_short_branches_are_not_made():
    generator = np.random.default_rng(2)
    means = means_of(clusters((3, 3, 3, 3), 0.5, -0.2), generator)
    few = SplitConfig(groups="auto", min_steps=60_000)
    decision = choose(means, 200, 20.0, generator, config=few)
    assert decision.reason == (
        "splitting would not help: 2 branches would take 50000 optimizer steps each, fewer than "
        "60000"
    )
    some = SplitConfig(groups="auto", min_steps=30_000)
    assert choose(means, 200, 20.0, generator, config=some).num_groups in (2, 3)


def test_conflicts_that_are_only_noise_are_named():
    generator = np.random.default_rng(5)
    decision = choose(means_of(np.eye(16), generator), 200, 20.0, generator)
    assert decision.num_groups == 1
    assert "no split parts pairs that surely conflict; for" in decision.reason
    one = choose(means_of(np.ones((2, 2)), generator), 200, 20.0, generator)
    assert "fewer than three datasets" in one.reason


def test_pins_hold_in_the_chosen_groups():
    generator = np.random.default_rng(3)
    pins = Pins(together=(("d00", "d04"),), group={"d01": 1})
    config = SplitConfig(groups="auto", pins=pins)
    means = means_of(clusters((4, 4), 0.5, -0.3), generator)
    labels = choose(means, 200, 20.0, generator, config=config).partition.labels
    assert labels[0] == labels[4] and labels[1] == 1


def test_candidates_reach_half_of_the_datasets_and_keep_the_pins():
    names = [f"d{i:02}" for i in range(12)]
    assert candidate_numbers(names, Pins(), ()) == [2, 3, 4, 5, 6]
    assert candidate_numbers(names, Pins(), (), powers_of_two=True) == [2, 4]
    assert [candidate_numbers(names[:n], Pins(), ()) for n in (2, 3, 4, 5, 6, 7)] == [
        [],
        [2],
        [2],
        [2],
        [2, 3],
        [2, 3],
    ]
    pins = Pins(together=(("d00", "d01", "d02"), ("d02", "d03")), group={"d05": 2})
    assert candidate_numbers(names, pins, ("d11",)) == [3, 4]
    assert candidate_numbers(names, Pins(apart=(tuple(names[:4]),)), ()) == [4, 5, 6]
