"""Cosines from block sums with honest errors, signal and centring."""

import numpy as np
import pytest
from support.split.block_sums import draw, measure_conflict, sample, unit

from merit_fast.block_estimates import signal_fractions
from merit_fast.split.conflict import (
    between_sum,
    center_columns,
    conflict_of,
    cosine_matrix,
    double_center,
)
from merit_fast.split.moments import block_products


# ---- cosines and their errors
def test_cosine_of_a_zero_row_is_zero():
    assert cosine_matrix(np.array([[0.0, 0], [1, 2]])).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("debias", ["blocks", "none"])
def test_errors_are_the_spread_of_what_they_belong_to(debias):
    generator = np.random.default_rng(1)
    means = unit(generator.standard_normal((1, 40)) + generator.standard_normal((3, 40)))
    conflicts = [
        conflict_of(block_products(*sample(means, 100, 20, generator)), debias=debias)
        for _ in range(400)
    ]
    spread = np.std([conflict.cosine for conflict in conflicts], axis=0)
    stated = np.sqrt(np.mean([np.square(conflict.error) for conflict in conflicts], axis=0))
    off = ~np.eye(3, dtype=bool)
    assert stated[off] == pytest.approx(spread[off], rel=0.3)


def test_a_cosine_lies_within_two_errors_as_often_as_it_should():
    generator = np.random.default_rng(2)
    means = unit(generator.standard_normal((1, 200)) + generator.standard_normal((12, 200)))
    inside = []
    upper = np.triu_indices(12, 1)
    for _ in range(40):
        conflict = conflict_of(block_products(*sample(means, 200, 80, generator)), debias="blocks")
        inside.append(
            np.abs(conflict.cosine - means @ means.T)[upper] <= 2.365 * conflict.error[upper]
        )
    assert 0.93 <= np.mean(inside) <= 0.995  # Student's t with 7 degrees of freedom: 0.95


def test_debiased_cosines_have_the_slope_of_the_truth_and_naive_ones_have_not():
    generator = np.random.default_rng(3)
    means = unit(generator.standard_normal((20, 3)) @ generator.standard_normal((3, 300)))
    upper = np.triu_indices(20, 1)
    truth = (means @ means.T)[upper]
    slopes = {"blocks": [], "none": []}
    for _ in range(20):
        products = block_products(*sample(means, 200, 80, generator))
        for debias, of_debias in slopes.items():
            of_debias.append(
                np.polyfit(truth, conflict_of(products, debias=debias).similarity[upper], 1)[0]
            )
    assert np.mean(slopes["blocks"]) == pytest.approx(1.0, abs=0.03)
    assert np.mean(slopes["none"]) == pytest.approx(1 / (1 + 80 / 200), abs=0.03)


def test_a_dataset_of_noise_has_no_cosine_and_keeps_out_of_the_partition():
    generator = np.random.default_rng(4)
    means = unit(generator.standard_normal((4, 500)))
    means[2] = 0
    conflict = conflict_of(block_products(*sample(means, 100, 30, generator)), debias="blocks")
    assert conflict.resolved.tolist() == [True, True, False, True]
    assert conflict.more_examples[2] >= 100
    assert conflict.more_examples[[0, 1, 3]].tolist() == [0, 0, 0]
    hidden = np.zeros((4, 4), bool)
    hidden[2] = hidden[:, 2] = True
    assert np.array_equal(np.isnan(conflict.cosine), hidden) and np.array_equal(
        np.isnan(conflict.error), hidden
    )
    assert np.isnan(conflict.norm).tolist() == [False, False, True, False]
    assert np.isfinite(conflict.similarity).all() and np.isfinite(conflict.gram).all()
    assert np.abs(conflict.similarity[2, [0, 1, 3]]).max() < 0.5
    assert np.array_equal(conflict.similarity[~hidden], conflict.cosine[~hidden])


def test_a_zero_gradient_and_too_few_blocks_are_not_resolved():
    sums = np.random.default_rng(5).standard_normal((2, 4, 50)) + 5
    sums[0] = 0
    conflict = conflict_of(block_products(sums, np.full((2, 4), 10)), debias="blocks")
    assert conflict.resolved.tolist() == [False, True] and conflict.signal_fraction[0] == 0
    assert conflict.similarity.tolist() == [[1, 0], [0, 1]]
    two = conflict_of(block_products(sums[:, :2], np.full((2, 2), 10)), debias="blocks")
    assert (
        not two.resolved.any()
        and (two.more_examples > 0).all()
        and np.isfinite(two.similarity).all()
    )


def test_similarity_is_cosines_or_inner_products():
    sums, counts = draw()
    products = block_products(sums, counts)
    for debias in ("blocks", "none"):
        cosine = conflict_of(products, similarity="cosine", debias=debias)
        gram = conflict_of(products, similarity="gram", debias=debias)
        assert np.array_equal(gram.similarity, gram.gram) and np.array_equal(cosine.gram, gram.gram)
        assert np.abs(cosine.similarity).max() <= (1.2 if debias == "blocks" else 1.0)
        assert (np.diag(cosine.similarity) == 1).all()
    mean = sums.sum(1) / counts.sum(1)[:, None]
    assert cosine.cosine == pytest.approx(cosine_matrix(mean), abs=1e-6)
    assert cosine.norm == pytest.approx(np.linalg.norm(mean, axis=1))


def test_negative_pairs_are_counted_and_doubtful_ones_told_apart():
    rows = np.array([[1.0, 0], [-1, 0.1], [0, 1]])
    clear = measure_conflict(np.repeat(rows[:, None] / 2, 2, axis=1), np.ones((3, 2)))
    assert clear.negative_pair_fraction == clear.certain_negative_fraction == pytest.approx(1 / 3)
    assert np.allclose(clear.error, 0)
    generator = np.random.default_rng(6)
    means = unit(np.ones((6, 400)) * 0.3 + generator.standard_normal((6, 400)) * 3)
    noisy = measure_conflict(*sample(means, 64, 10, generator), debias="blocks")
    assert noisy.certain_negative_fraction < noisy.negative_pair_fraction
    noise = measure_conflict(*sample(np.zeros((3, 400)), 64, 10, generator), debias="blocks")
    assert noise.negative_pair_fraction == noise.certain_negative_fraction == 0


# ---- signal
def test_signal_fraction_is_unbiased_and_one_without_noise():
    generator = np.random.default_rng(0)
    means = np.tile(generator.standard_normal(50), (200, 1))
    conflict = measure_conflict(*sample(means, 67, 36 * 50, generator))
    assert np.mean(conflict.signal_fraction * conflict.norm**2) == pytest.approx(
        means[0] @ means[0], rel=0.05
    )
    assert conflict.signal_fraction.std() == pytest.approx(
        np.sqrt(np.mean(conflict.signal_error**2)), rel=0.3
    )
    clean = measure_conflict(np.tile(means[0] * 8, (1, 8, 1)), np.full((1, 8), 8), debias="blocks")
    assert clean.signal_fraction[0] == pytest.approx(1.0) and clean.resolved.all()
    assert clean.norm[0] == pytest.approx(np.linalg.norm(means[0]))


def test_noise_is_seldom_called_resolved_and_the_examples_asked_for_resolve_a_signal():
    generator = np.random.default_rng(7)

    def resolved(square, examples):
        means = np.full((500, 100), np.sqrt(square / 100))
        return measure_conflict(*sample(means, examples, 1.0, generator)).more_examples

    assert (resolved(0.0, 200) == 0).mean() < 0.08
    more = resolved(1 / 1200, 200)
    assert (more == 0).mean() < 0.5
    asked = int(np.median(more[more > 0]))
    assert (resolved(1 / 1200, 200 + asked) == 0).mean() > 1.5 * (more == 0).mean()


def test_signal_of_unequal_and_empty_blocks():
    generator = np.random.default_rng(8)
    counts = np.tile([9, 1, 4, 0, 3], (4000, 1))
    mean = np.full(30, 0.2)
    noise = generator.standard_normal((4000, 5, 30)) * np.sqrt(counts)[:, :, None]
    sums = counts[:, :, None] * mean + noise
    fraction, error = signal_fractions(sums @ sums.transpose(0, 2, 1), counts.astype(float))
    naive = np.square(sums.sum(1) / 17).sum(1)
    assert np.mean(fraction * naive) == pytest.approx(mean @ mean, rel=0.05)
    assert np.isfinite(error).all()


# ---- centring and eta squared
def test_centring_takes_the_weighted_mean_off():
    generator = np.random.default_rng(9)
    rows = generator.standard_normal((7, 12))
    weights = generator.dirichlet(np.ones(7))
    rest = rows - weights @ rows
    assert double_center(rows @ rows.T, weights) == pytest.approx(rest @ rest.T)
    cosine = cosine_matrix(rows)
    assert center_columns(cosine) == pytest.approx(cosine - cosine.mean(0))


def test_rows_spread_over_all_groups_count_in_each():
    generator = np.random.default_rng(10)
    rows = generator.standard_normal((5, 12))
    weights = generator.dirichlet(np.ones(5))
    rows -= weights @ rows
    halves = np.concatenate([rows[:4], rows[4:], rows[4:]])
    shared = np.concatenate([weights[:4], weights[4:] / 2, weights[4:] / 2])
    expected = between_sum(halves @ halves.T, shared, [0, 1, 0, 1, 0, 1])
    assert between_sum(rows @ rows.T, weights, [0, 1, 0, 1, -1]) == pytest.approx(expected)
    assert between_sum(rows @ rows.T, weights, [-1] * 5) == pytest.approx(0, abs=1e-12)
