"""Controls, counts and the null in split.json."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
from support.split.block_sums import sample, unit
from support.split.stages import split_sums

from merit_fast.manifests.io import manifest_text
from merit_fast.progress import SilentProgress
from merit_fast.report.split_tables import separation_rows
from merit_fast.split import SplitConfig
from merit_fast.split.search.problem import Pins


def means_of(number, seed=0):
    """One conflict axis under noise of the datasets' own."""
    generator = np.random.default_rng(seed)
    signs = np.where(np.arange(number) % 2, 1.0, -1.0)[:, None]
    own = unit(generator.standard_normal((number, 200)))
    return own + signs * unit(generator.standard_normal((1, 200)))


def split_of(number, config, seed=0, **options):
    generator = np.random.default_rng(seed)
    return split_sums(*sample(means_of(number, seed), 64, 5.0, generator), config, **options)


def partition(labels):
    groups = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    spread = tuple(groups.pop(-1, ()))
    return frozenset(map(tuple, groups.values())), spread


def own(split):
    return [row.group for row in split.datasets]


def test_controls_are_distinct_and_never_the_split():
    split = split_of(8, SplitConfig(groups=2), num_controls=5)
    assert split.num_splits == 35 and len(split.controls) == 5
    assert split.control_arms == ("random", "random2", "random3", "random4", "random5")
    assert len({partition(row) for row in (own(split), *split.controls)}) == 6
    assert split_of(8, SplitConfig(groups=2)).controls == split.controls[:1]


@pytest.mark.parametrize(
    "number,groups,others", [(6, 2, 9), (6, 6, 0), (5, 1, 0), (4, 2, 2), (6, 3, 14)]
)
def test_there_are_no_more_controls_than_splits(number, groups, others):
    split = split_of(number, SplitConfig(groups=groups), num_controls=20)
    assert split.num_splits == others + 1 and len(split.controls) == others
    if groups > 1:
        measured = split.separation
        assert (measured.null_splits, measured.num_splits) == (others, others + 1)
        assert measured.null_std is None and measured.null_beaten <= others


def test_many_splits_are_judged_by_their_deviation():
    measured = split_of(12, SplitConfig(groups=2)).separation
    assert (measured.num_splits, measured.null_splits) == (462, 200)
    assert measured.cross_validated > measured.null_mean + 2 * measured.null_std
    assert measured.null_beaten == 200


def test_controls_keep_pins_and_spread_datasets():
    pins = Pins(together=(("d01", "d02"),), group={"d05": 1})
    config = SplitConfig(groups=2, pins=pins, spread=("d04",), tolerance=0.2)
    split = split_of(9, config, num_controls=30)
    assert split.controls
    for row in split.controls:
        assert row[1] == row[2] and row[5] == 1 and row[4] == -1 and set(row) == {-1, 0, 1}
    assert partition(own(split)) not in {partition(row) for row in split.controls}


@pytest.mark.parametrize(
    "values",
    [
        {"method": "random"},
        {"method": "anti"},
        {"method": "kmeans"},
        {"method": "iid"},
        {"preset": "paper"},
        {"balance": "none"},
        {"method": "manual", "manual": (("d00", "d01", "d02", "d03", "d04"), ("d05",))},
    ],
    ids=str,
)
def test_every_method_has_controls_of_its_own_balance(values):
    """Of six datasets of one size: ten splits in halves, 31 splits of any size."""
    split = split_of(6, SplitConfig(groups=2, **values), num_controls=40)
    in_halves = max(np.bincount([max(label, 0) for label in own(split)])) == 3
    others = 9 if in_halves and values.get("balance") != "none" else 30
    if values.get("method") == "iid":
        others = 10
    assert len(split.controls) == others and split.num_splits == others + 1
    assert len({partition(row) for row in (own(split), *split.controls)}) == others + 1


def test_an_unbalanced_mixture_keeps_the_groups_found_without_balance():
    rows = [600, 100, 100, 100, 100, 100]
    split = split_of(6, SplitConfig(groups=2), rows=rows)
    assert split.note and len(split.unbalanced) == 6
    assert 0 <= split.unbalanced_eta_squared <= 1
    assert partition(split.unbalanced) == partition([0, 1, 0, 1, 0, 1])
    assert split_of(6, SplitConfig(groups=2, method="random")).unbalanced == ()


def test_noise_gives_no_share_outside_of_one_whole():
    generator = np.random.default_rng(5)
    for seed in range(6):
        sums = sample(np.zeros((8, 200)), 64, 5.0, np.random.default_rng(seed))
        split = split_sums(*sums, SplitConfig(groups=2))
        for row in split.separations:
            values = (row.eta_squared, row.cross_validated, row.null_mean)
            assert all(value is None or 0 <= value <= 1 for value in values)
    same = np.tile(unit(generator.standard_normal((1, 200))), (8, 1))
    split = split_sums(*sample(same, 64, 5.0, generator), SplitConfig(groups="auto"))
    assert split.groups == 1 and "no more than their noise" in split.reason


def test_a_split_into_single_datasets_is_like_its_controls():
    split = split_of(4, SplitConfig(groups=4))
    assert split.num_splits == 1 and split.controls == ()
    assert separation_rows(split)[1][0][-1] == "the same"


def test_split_json_has_gram_noise_scales_and_suggested_shares():
    split = split_of(6, SplitConfig(groups=2))
    gram = np.array(split.gram)
    norm = np.array([row.gradient_norm for row in split.datasets])
    assert np.sqrt(np.diag(gram)) == pytest.approx(norm)
    assert gram[0, 2] / (norm[0] * norm[2]) == pytest.approx(split.similarity[0][2])
    assert sum(row.suggested_share for row in split.datasets) == pytest.approx(1)
    assert all(row.suggested_share_error >= 0 for row in split.datasets)
    plain = json.loads(manifest_text(split))
    assert plain["numbers_tried"][0]["parted_cosine"] < 0 < plain["numbers_tried"][0]["kept_cosine"]


class Recorded(SilentProgress):
    def __init__(self):
        self.tasks = {}

    @contextmanager
    def task(self, name, total, unit):
        self.tasks[name] = [total, 0]
        self.name = name
        yield self

    def advance(self, amount, detail=""):
        self.tasks[self.name][1] += amount


@pytest.mark.parametrize("number,shown", [(12, False), (60, True)])
def test_a_split_of_many_datasets_shows_its_progress(number, shown):
    progress = Recorded()
    split_of(number, SplitConfig(groups=2), progress=progress)
    expected = {"inner products": [4096, 4096], "split": [12, 12]} if shown else {}
    assert progress.tasks == expected
