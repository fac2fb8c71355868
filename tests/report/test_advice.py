"""Advice on a split: noise and one distribution are never split, planted opposites are."""

from dataclasses import replace

import numpy as np
import pytest
from support.report.manifests import make_split
from support.split.block_sums import sample, unit
from support.split.stages import split_sums

from merit_fast.manifests.schemas import GroupCount, TriedNumber
from merit_fast.report import reasons
from merit_fast.report.advice import advise
from merit_fast.split import SplitConfig
from merit_fast.train import schedule


def opposites(generator, number):
    """Means along one direction, every second one against it."""
    signs = np.where(np.arange(number) % 2, 1.0, -1.0)[:, None]
    return unit(generator.standard_normal((1, 300))) * signs + 0.3 * unit(
        generator.standard_normal((number, 300))
    )


def families(generator, number, count):
    """Groups of alike means that all share a direction: structure, but no conflict."""
    own = unit(generator.standard_normal((count, 300)))
    return own[np.arange(number) % count] + 1.2 * unit(generator.standard_normal((1, 300)))


def split_of(means, seed, groups=2, examples=64, noise=20.0, **options):
    generator = np.random.default_rng(seed)
    config = SplitConfig(groups=groups, **options.pop("config", {}))
    return split_sums(*sample(means, examples, noise, generator), config, **options)


def judged(**changes):
    """A split of 16 datasets in two groups, with conflicts and better than chance."""
    values = {
        "negative_pair_fraction": 0.5,
        "certain_negative_fraction": 0.4,
        "sure_conflicts": 40,
        "sure_conflicts_across": 40,
        "separations": (GroupCount(2, 0.6, 0.5, 0.1, 0.05, 200, 200),),
    }
    return replace(make_split(16, 2), **{**values, **changes})


# ---- from gradients
@pytest.mark.parametrize("number,groups", [(6, 2), (12, 2), (16, 4)])
def test_planted_opposites_are_split(number, groups):
    split = split_of(opposites(np.random.default_rng(number), number), number, groups)
    advice = advise(split)
    assert advice.advice == "split" and advice.groups == groups
    pairs = (number // 2) ** 2
    assert advice.sentence.startswith(
        f"Split into {groups} groups: {pairs} of {number * (number - 1) // 2} pairs"
    )
    assert "merit-fast run CONFIG.yml" in advice.next[0]
    signs = [row.group for row in split.datasets]
    assert not set(signs[::2]) & set(signs[1::2])


@pytest.mark.parametrize("number", [6, 12])
def test_samples_of_one_distribution_are_never_split(number):
    for seed in range(4):
        means = np.tile(unit(np.random.default_rng(seed).standard_normal((1, 300))), (number, 1))
        split = split_of(means, seed, noise=100.0)
        assert advise(split).advice != "split"
        measured = split.separation
        assert all(
            value is None or 0 <= value <= 1
            for value in (measured.eta_squared, measured.cross_validated, measured.null_mean)
        )


def test_pure_noise_needs_more_rows():
    split = split_of(np.zeros((6, 300)), 0)
    advice = advise(split)
    assert advice.advice == "measure more" and "more rows of d0" in advice.sentence
    assert advice.next[0].endswith(
        "merit-fast advise CONFIG.yml split.examples="
        f"{max(row.num_sketched_examples + row.more_examples for row in split.datasets)}"
    )
    short = split_of(np.zeros((6, 300)), 0, rows=[70] * 6)
    assert advise(short).next[1].startswith("add rows to the datasets that have too few: d0")


def test_structure_without_conflict_is_no_reason_to_split():
    split = split_of(families(np.random.default_rng(1), 16, 4), 1, 4)
    assert reasons.beats_null(split.separation) and split.sure_conflicts == 0
    advice = advise(split)
    assert advice.sentence == "Do not split: no pair of datasets surely conflicts."
    assert any("structure, not conflict" in reason for reason in advice.reasons)
    assert "split.warmup=0.25" in advice.next[0] and "WiSE-FT" in advice.next[1]
    warm = advise(replace(split, sketched_at="after a joint warm-up on 25% of the rows"))
    assert not any("warm-up" in text for text in warm.next)


def test_six_datasets_cannot_be_judged_by_chance():
    split = split_of(families(np.random.default_rng(2), 6, 2), 2)
    assert split.num_splits == 10 and split.separation.null_splits == 9
    assert split.separation.null_std is None
    sentence = reasons.separation_sentence(split)
    assert "cannot be judged with 6 datasets: 10 balanced splits exist, p >= 0.1" in sentence
    assert "better than 9 of 9 others" in sentence
    assert advise(split).advice == "do not split"


def test_as_many_groups_as_datasets_leave_no_other_split():
    split = split_of(opposites(np.random.default_rng(3), 4), 3, 4)
    assert split.num_splits == 1 and split.controls == ()
    assert "no other balanced split exists, p >= 1" in reasons.separation_sentence(split)


def test_the_price_of_balance_is_told_in_numbers():
    """Two alike datasets weigh so much that balance puts them into different groups."""
    generator = np.random.default_rng(4)
    means = opposites(generator, 6)
    means[3] = means[0] + 0.1 * unit(generator.standard_normal((1, 300)))[0]
    rows = [900, 100, 100, 900, 100, 100]
    split = split_of(means, 4, rows=rows)
    assert split.datasets[0].group != split.datasets[3].group
    assert split.unbalanced[0] == split.unbalanced[3]
    price = reasons.balance_price(split)
    assert price.startswith("Balance puts d00 and d03, cosine +")
    assert f"without balance it is {split.unbalanced_eta_squared:.3f}." in price
    assert price in advise(split).reasons
    advice = advise(split)
    assert advice.advice == "do not split"
    assert any("split.tolerance=" in text for text in advice.next)
    free = split_of(means, 4, rows=rows, config={"balance": "none"})
    assert free.unbalanced == () and reasons.balance_price(free) == ""


# ---- from figures
def test_the_checks_come_in_order():
    assert advise(judged()).advice == "split"
    cases = [
        (
            {"separations": (GroupCount(2, 0.6, 0.15, 0.1, 0.05, 200, 150),)},
            "no better than random",
        ),
        ({"separations": (GroupCount(2, None, None, None, None),)}, "no more than the noise"),
        ({"separations": (GroupCount(2, 0.6, None, None, None),)}, "half of the examples"),
        ({"separations": (GroupCount(2, 0.6, 0.5, 0.2, None, 9, 7),)}, "7 of 9 other balanced"),
        ({"sure_conflicts": 5, "sure_conflicts_across": 5}, "only 5 of 120 pairs surely conflict"),
        ({"sure_conflicts_across": 10}, "30 of the 40 pairs that surely conflict stay in one"),
    ]
    for changes, reason in cases:
        advice = advise(judged(**changes))
        assert advice.advice == "do not split" and reason in advice.sentence, advice.sentence
    assert advise(judged(separations=(GroupCount(2, 0.6, 0.5, 0.2, None, 9, 9),))).advice == "split"


def test_a_number_that_conflicts_on_held_out_blocks_chose_is_advised():
    """Pairs conflict surely together, none by itself, and there are too few splits for a null."""
    row = TriedNumber(2, 0.5, -0.1, 0.01, 1, -0.1, 0.6, 0.02, taken=True)
    few = (GroupCount(2, 0.6, 0.5, 0.2, None, 9, 7),)
    split = judged(separations=few, sure_conflicts=0, sure_conflicts_across=0, numbers_tried=(row,))
    advice = advise(split)
    assert advice.advice == "split" and "mean cosine of -0.100 ± 0.010" in advice.sentence
    asked = replace(split, numbers_tried=(replace(row, taken=False),))
    assert advise(asked).advice == "do not split"


def test_few_steps_are_an_objection():
    advice = advise(judged(), [60, 70])
    assert advice.advice == "do not split"
    assert "60 optimizer steps, fewer than 100" in advice.sentence
    assert "train 2 times as many epochs" in advice.next[0]
    assert advise(judged(), [100, 170]).advice == "split"
    assert reasons.FEW_STEPS == schedule.FEW_STEPS


def test_conflicts_within_their_errors_need_more_rows():
    split = judged(sure_conflicts=0, sure_conflicts_across=0)
    errors = tuple(tuple(0.2 for _ in row) for row in split.similarity)
    advice = advise(replace(split, similarity_errors=errors))
    assert advice.advice == "measure more" and "about 4 times as many rows" in advice.sentence
    sure = tuple(tuple(0.05 for _ in row) for row in split.similarity)
    assert advise(replace(split, similarity_errors=sure)).advice == "do not split"


def test_one_group_and_one_dataset():
    one = replace(make_split(5, 1), separations=())
    assert advise(one).sentence == "Do not split: one group was asked for."
    chosen = replace(one, reason="splitting would not help: there are too few datasets")
    assert advise(chosen).sentence == "Do not split: there are too few datasets."
    better = replace(one, separations=(GroupCount(2, 0.6, 0.5, 0.1, 0.05, 200, 200),))
    assert "split.groups=2" in advise(better).next[0]
    assert advise(make_split(1, 1)).sentence == "Do not split: one dataset makes one group."


def test_cosines_are_shown_up_to_one():
    assert reasons.shown_cosine(1.172, 0.134) == "+1.000 ± 0.134"
    assert reasons.shown_cosine(-1.05) == "-1.000"
    assert reasons.shown_cosine(0.25) == "+0.250"
    assert reasons.shown_cosine(None) == "not resolved"
