"""Pins: every method keeps them, or refuses them in one line."""

import numpy as np
import pytest
from support.split.partitions import NAMES, mixture, split

from merit_fast.errors import InputError
from merit_fast.options.parser import parse
from merit_fast.split.search.problem import Pins
from merit_fast.split.search.space import other_splits


@pytest.mark.parametrize(
    "method", ["pca-swap", "pca-median", "pddp", "kmeans", "random", "text-cluster", "anti"]
)
def test_pins_hold_in_every_method(method):
    pins = Pins(
        together=(("d00", "d07", "d09"), ("d09", "d11")),
        apart=(("d01", "d02", "d00"), ("d03", "d04")),
        group={"d05": 2, "d06": 2, "d07": 1},
    )
    for seed in range(3):
        partition = split(*mixture(seed, 16), 4, method, pins=pins, seed=seed)
        group = dict(zip(NAMES, partition.labels, strict=False))
        assert group["d00"] == group["d07"] == group["d09"] == group["d11"] == 1
        assert group["d05"] == group["d06"] == 2
        assert len({group["d00"], group["d01"], group["d02"]}) == 3 and group["d03"] != group["d04"]
        assert set(partition.labels) == {0, 1, 2, 3}


def test_apart_is_kept_where_it_leaves_a_single_way():
    names = NAMES[:6]  # a 3-colouring of a prism with two corners pinned
    apart = tuple(
        (names[a], names[b])
        for a, b in ((0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5), (0, 3), (1, 4))
    )
    pins = Pins(apart=apart, group={"d00": 0, "d05": 0})
    for seed in range(6):
        groups = split(*mixture(seed, 6), 3, pins=pins).labels
        assert all(groups[names.index(a)] != groups[names.index(b)] for a, b in apart)
        assert groups[0] == groups[5] == 0


def test_random_splits_obey_the_splits_pins():
    weights = mixture(12, 20)[1]
    pins = Pins(together=(("d00", "d01"),), apart=(("d02", "d03"),), group={"d04": 3})
    draws = other_splits(None, weights, NAMES[:20], 4, 50, pins=pins, tolerance=0.05).labels
    assert (
        (draws[:, 0] == draws[:, 1]).all()
        and (draws[:, 2] != draws[:, 3]).all()
        and (draws[:, 4] == 3).all()
    )
    shares = np.stack([(draws == k) @ weights for k in range(4)])
    assert np.abs(shares - 0.25).max() <= 0.05 + 1e-9
    assert len({tuple(row) for row in draws.tolist()}) == 50
    again = other_splits(
        None, weights[::-1], NAMES[:20][::-1], 4, 50, pins=pins, tolerance=0.05
    ).labels
    assert (again[:, ::-1] == draws).all()


@pytest.mark.parametrize(
    "pins,message",
    [
        (
            Pins(together=(("d00", "x"),)),
            "pins.together: must be a dataset of the mixture, got 'x'",
        ),
        (Pins(group={"x": 0}), "pins.group: must be a dataset of the mixture, got 'x'"),
        (Pins(group={"d01": 2}), "pins.group.d01: must be 0 to 1, got 2"),
        (
            Pins(together=(("d00", "d01"),), apart=(("d01", "d00"),)),
            "pins: d00 and d01 must be together and apart",
        ),
        (
            Pins(together=(("d00", "d01"), ("d01", "d02")), group={"d00": 0, "d02": 1}),
            "pins: d00 and d02 must be together, but are pinned to groups 0 and 1",
        ),
        (
            Pins(apart=(("d00", "d01"),), group={"d00": 1, "d01": 1}),
            "pins: d00 and d01 must be apart, but both are pinned to group 1",
        ),
        (
            Pins(apart=(("d00", "d01", "d02"),)),
            "pins.apart: d00, d01, d02 must be apart, which takes 3 groups, not 2",
        ),
        (
            Pins(apart=(("d00", "d01"), ("d01", "d02"), ("d02", "d00"))),
            "pins: no way to keep d00, d01, d02 apart in 2 groups",
        ),
        (
            Pins(group={name: 0 for name in NAMES[:6]}),
            "groups: must be at most the number of datasets",
        ),
    ],
)
def test_pins_that_cannot_be_kept_are_named_in_one_line(pins, message):
    with pytest.raises(InputError) as error:
        split(*mixture(0, 6), 2, pins=pins)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_pins_are_read_from_a_config():
    values = {"together": [["d00", "d01"]], "apart": [["d02", "d03"]], "group": {"d04": 1}}
    pins = parse(Pins, values, "run.yaml", "split.pins")
    assert pins == Pins(together=(("d00", "d01"),), apart=(("d02", "d03"),), group={"d04": 1})
    groups = split(*mixture(0, 6), 2, pins=pins).labels
    assert groups[0] == groups[1] and groups[2] != groups[3] and groups[4] == 1


def test_a_spread_dataset_cannot_be_pinned():
    with pytest.raises(
        InputError, match="pins.group: d00 cannot be pinned, its rows are spread over all groups"
    ):
        split(*mixture(0, 6), 2, pins=Pins(group={"d00": 0}), spread=["d00"])
