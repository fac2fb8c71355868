"""Paired comparisons against brute force: resampled rows, and plain loops over datasets."""

import dataclasses

import numpy as np
import pytest

from merit_fast.errors import InputError
from merit_fast.evaluate.compare import MEASURES, compare, compare_arms, item_error, rank
from merit_fast.evaluate.items import ItemScores, Measured, measured, read_items, write_items

STRATA = (5, 9, 3)


def scores(seed, worse=0.0):
    """A model on the same items as every other, ``worse`` nats per token worse."""
    items = np.random.default_rng(0)
    row_tokens = items.integers(1, 12, sum(STRATA)).astype(float)
    noise = np.random.default_rng(seed)

    def losses(tokens):
        return tokens * (1.0 + worse + 0.1 * noise.random(len(tokens)))

    text_tokens, chat_tokens = items.integers(9, 40, 4) * 1.0, items.integers(9, 40, 6) * 1.0
    return ItemScores(
        losses(row_tokens),
        (noise.random(len(row_tokens)) < 0.6).astype(float),
        row_tokens,
        losses(text_tokens),
        text_tokens,
        losses(chat_tokens),
        chat_tokens,
    )


def test_the_difference_is_that_of_the_arms_and_its_error_that_of_paired_rows():
    a, b = scores(1), scores(2, worse=0.3)
    result = compare("loss", ("merit", [a]), ("joint", [b]), STRATA)
    means, variances = [], []
    first = 0
    for n in STRATA:  # a loop over datasets and rows, with the ratio's residuals
        rows = range(first, first + n)
        first += n
        tokens = sum(a.row_tokens[i] for i in rows)
        d = sum(a.row_loss[i] - b.row_loss[i] for i in rows) / tokens
        residuals = [a.row_loss[i] - b.row_loss[i] - d * a.row_tokens[i] for i in rows]
        means.append(d)
        variances.append(n / (n - 1) * sum(r * r for r in residuals) / tokens**2)
    assert result.difference == pytest.approx(sum(means) / 3)
    assert result.item_error == pytest.approx(sum(variances) ** 0.5 / 3)
    assert (result.num_items, result.num_seeds, result.seed_error) == (17, 1, None)
    own = [measured(one, "loss", STRATA).mean for one in (a, b)]
    assert result.difference == pytest.approx(own[0] - own[1])


def test_the_error_of_exact_match_is_that_of_means_over_datasets():
    a, b = scores(1), scores(2)
    result = compare("exact_match", ("merit", [a]), ("joint", [b]), STRATA)
    parts = np.split(a.row_exact - b.row_exact, np.cumsum(STRATA)[:-1])
    assert result.difference == pytest.approx(np.mean([part.mean() for part in parts]))
    variance = sum(part.var(ddof=1) / len(part) for part in parts)
    assert result.item_error == pytest.approx(variance**0.5 / 3)


def test_the_item_error_is_the_spread_of_the_difference_over_other_rows():
    numbers = np.random.default_rng(5)
    strata = (200, 300)
    sizes = numbers.integers(1, 10, 500) * 1.0
    values = sizes * numbers.normal(0.2, 0.5, 500)
    shown = item_error(Measured(values, sizes, strata))
    drawn = []
    for _ in range(2000):
        parts = [numbers.integers(0, 200, 200), 200 + numbers.integers(0, 300, 300)]
        drawn.append(np.mean([values[part].sum() / sizes[part].sum() for part in parts]))
    assert shown == pytest.approx(np.std(drawn), rel=0.1)


def test_pairing_takes_out_what_rows_have_in_common():
    a = scores(1)
    hard = np.random.default_rng(3).random(17) * 50
    b = dataclasses.replace(a, row_loss=a.row_loss + 0.01 * a.row_tokens)
    a, b = (dataclasses.replace(one, row_loss=one.row_loss + hard) for one in (a, b))
    result = compare("loss", ("merit", [a]), ("joint", [b]), STRATA)
    assert result.difference == pytest.approx(-0.01)
    assert result.item_error == pytest.approx(0.0, abs=1e-12)


def test_seeds_are_paired_and_the_base_has_none():
    merit = [scores(seed, worse) for seed, worse in ((1, 0.1), (2, 0.2), (3, 0.3))]
    joint = [scores(seed, worse) for seed, worse in ((4, 0.2), (5, 0.3), (6, 0.4))]
    result = compare("loss", ("merit", merit), ("joint", joint), STRATA)
    means = [[measured(one, "loss", STRATA).mean for one in arm] for arm in (merit, joint)]
    by_seed = np.subtract(*means)
    assert result.difference == pytest.approx(by_seed.mean())
    assert result.seed_error == pytest.approx(by_seed.std(ddof=1) / 3**0.5)
    assert result.num_seeds == 3
    against_base = compare("loss", ("merit", merit), ("base", [scores(7)]), STRATA)
    assert against_base.num_seeds == 3
    assert against_base.seed_error == pytest.approx(np.std(means[0], ddof=1) / 3**0.5)
    one_seed = compare("loss", ("merit", merit), ("joint", joint[:1]), STRATA)
    assert (one_seed.num_seeds, one_seed.seed_error) == (1, None)


def test_merit_meets_every_arm_and_the_best_meets_the_second():
    arms = {
        "base": [scores(1, 2.0)],
        "joint": [scores(2, 0.1)],
        "random": [scores(3, 0.4)],
        "merit": [scores(4, 0.7)],
    }
    assert rank(arms, "loss", STRATA) == ["joint", "random", "merit", "base"]
    assert "base" not in rank(arms, "text_loss", STRATA)
    pairs = {(c.measure, c.first, c.second) for c in compare_arms(arms, STRATA)}
    for measure in MEASURES:
        assert {(measure, "merit", other) for other in ("base", "joint", "random")} <= pairs
    for measure in ("loss", "text_loss", "chat_nll"):
        assert (measure, "joint", "random") in pairs
    assert compare_arms({"base": [scores(1)]}, STRATA) == ()


def test_one_row_in_a_dataset_has_no_error():
    result = compare("loss", ("a", [scores(1)]), ("b", [scores(2)]), (16, 1))
    assert result.item_error is None


def test_arms_on_other_items_are_not_compared():
    other = dataclasses.replace(scores(2), row_tokens=scores(2).row_tokens + 1)
    with pytest.raises(ValueError, match="merit and joint were measured on different items"):
        compare("loss", ("merit", [scores(1)]), ("joint", [other]), STRATA)


def test_items_come_back_from_their_file_and_damage_is_named(tmp_path):
    file = tmp_path / "joint.items.safetensors"
    write_items(scores(1), file)
    before = file.read_bytes()
    write_items(read_items(file), file)
    assert file.read_bytes() == before
    file.write_bytes(before[:100])
    with pytest.raises(InputError, match=r"joint.items.safetensors: is not a file of item scores"):
        read_items(file)
