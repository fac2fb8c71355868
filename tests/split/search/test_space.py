"""The admissible splits next to a given one: all of them where they are few, each one once."""

import itertools

import numpy as np
import pytest
from support.split.partitions import NAMES, mixture, split

from merit_fast.split.search.problem import Pins
from merit_fast.split.search.space import other_splits


def canonical(labels):
    """The same tuple for all numberings of the groups; -1 stays."""
    number = {-1: -1}
    return tuple(number.setdefault(label, len(number) - 1) for label in labels)


def brute_force(weights, num_groups, limit, *, pins=None, spread=()):
    """Every admissible partition, by trying all labels of all datasets."""
    pins = pins or Pins()
    place = {name: i for i, name in enumerate(NAMES)}
    spread = {place[name] for name in spread}
    found = set()
    for labels in itertools.product(range(num_groups), repeat=len(weights)):
        if any(len({labels[place[name]] for name in names}) > 1 for names in pins.together):
            continue
        if any(len({labels[place[name]] for name in names}) < len(names) for names in pins.apart):
            continue
        if any(labels[place[name]] != group for name, group in pins.group.items()):
            continue
        dealt = [-1 if i in spread else label for i, label in enumerate(labels)]
        if not spread and len(set(labels)) < num_groups:
            continue
        shares = [
            sum(
                w / num_groups if d < 0 else w * (d == k)
                for w, d in zip(weights, dealt, strict=True)
            )
            for k in range(num_groups)
        ]
        if max(abs(share - 1 / num_groups) for share in shares) <= limit + 1e-12:
            found.add(canonical(dealt))
    return found


@pytest.mark.parametrize(
    "number,num_groups,options",
    [
        (6, 2, {}),
        (8, 2, {"pins": Pins(together=(("d00", "d01"),), apart=(("d02", "d03"),))}),
        (8, 3, {"pins": Pins(group={"d00": 2, "d03": 2, "d05": 0})}),
        (7, 3, {"spread": ("d02", "d04")}),
        (8, 4, {}),
        (5, 5, {}),
        (6, 3, {"pins": Pins(apart=(("d00", "d01", "d02"),)), "spread": ("d05",)}),
    ],
)
@pytest.mark.parametrize("limit", [0.04, 0.12, np.inf])
def test_all_splits_are_found_and_none_twice(number, num_groups, options, limit):
    for seed in range(3):
        weights = mixture(seed, number)[1]
        expected = brute_force(weights, num_groups, limit, **options)
        names = NAMES[:number]
        given = next(iter(sorted(expected)), None)
        result = other_splits(given, weights, names, num_groups, 10_000, tolerance=limit, **options)
        found = [canonical(row) for row in result.labels.tolist()]
        if given is None:  # the tolerance cannot be kept: the best that random deals reach
            assert len(found) == result.number > 0
            continue
        assert len(set(found)) == len(found) == result.number == len(expected) - 1
        assert set(found) == expected - {given}
        for name, group in options.get("pins", Pins()).group.items():
            assert (result.labels[:, names.index(name)] == group).all()


def test_six_datasets_of_one_size_have_ten_splits_in_two():
    result = other_splits([0, 0, 0, 1, 1, 1], np.ones(6), NAMES[:6], 2, 50)
    assert result.number == 9 and len(result.labels) == 9
    assert canonical([1, 1, 1, 0, 0, 0]) not in {canonical(row) for row in result.labels.tolist()}


def test_there_may_be_no_other_split():
    for given in ([0, 1, 2, 3], [3, 1, 0, 2]):
        result = other_splits(given, np.ones(4), NAMES[:4], 4, 50)
        assert result.number == 0 and result.labels.shape == (0, 4)
    one = other_splits([0, 0, 0], np.ones(3), NAMES[:3], 1, 50)
    assert one.number == 0 and one.labels.shape == (0, 3)


def test_a_split_out_of_balance_is_compared_with_those_no_worse():
    """One dataset of three fifths: no split is within the tolerance."""
    weights = np.array([0.6, 0.1, 0.1, 0.1, 0.1])
    best = [0, 1, 1, 1, 1]
    assert other_splits(best, weights, NAMES[:5], 2, 50).number == 0
    worse = [0, 0, 1, 1, 1]
    others = other_splits(worse, weights, NAMES[:5], 2, 50)
    assert others.number == len(brute_force(weights, 2, 0.2)) - 1 == 4
    assert canonical(best) in {canonical(row) for row in others.labels.tolist()}


def test_more_splits_begin_with_fewer_and_the_seed_chooses():
    weights = mixture(0, 14)[1]
    few = other_splits(None, weights, NAMES[:14], 2, 5).labels
    more = other_splits(None, weights, NAMES[:14], 2, 60).labels
    assert (more[:5] == few).all()
    assert (other_splits(None, weights, NAMES[:14], 2, 5, seed=1).labels != few).any()


def test_of_many_splits_distinct_ones_are_drawn():
    similarity, weights = mixture(3, 40)
    given = split(similarity, weights, 8).labels
    result = other_splits(given, weights, NAMES[:40], 8, 120)
    rows = {canonical(row) for row in result.labels.tolist()}
    assert result.number is None and len(rows) == 120 and canonical(given) not in rows
    shares = np.stack([(result.labels == k) @ weights for k in range(8)])
    assert np.abs(shares - 1 / 8).max() <= 0.05 / 8 + 1e-9


def test_datasets_dealt_to_all_groups_are_compared_with_whole_ones():
    result = other_splits([-1] * 6, np.ones(6), NAMES[:6], 2, 50)
    assert result.number == 10 and (result.labels >= 0).all()
