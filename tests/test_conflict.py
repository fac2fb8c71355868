"""What block sums tell: products with fixed bits, cosines with honest errors, signal, and a fair eta squared."""

import subprocess
import sys

import numpy as np
import pytest

from merit_fast.errors import MeritFastError
from merit_fast.split.conflict import (
    between_sum,
    center_matrix,
    conflict_of,
    cosine_matrix,
    double_center,
    eta_squared,
    measure_conflict,
    signal_fractions,
)
from merit_fast.split.medians import median_partition, weighted_axes
from merit_fast.split.moments import block_products, extend_products
from merit_fast.split.partition import random_groups
from merit_fast.split.separation import pair_means, separation

FIELDS = ("counts", "within", "total", "left_out", "halves")


def draw(datasets=6, blocks=8, width=5000, seed=0):
    """Block sums of very different lengths, with heavy-tailed columns, and unequal counts."""
    generator = np.random.default_rng(seed)
    lengths = np.exp(2 * generator.standard_normal((datasets, 1, 1)) + generator.standard_normal(width))
    sums = generator.standard_normal((datasets, blocks, width)) * lengths + 0.3 * lengths
    return sums, generator.integers(3, 9, (datasets, blocks))


def sample(means, examples, noise, generator, blocks=8):
    """Block sums of ``examples`` gradients, round-robin: each its dataset's mean, plus noise of that square length."""
    counts = np.array([examples // blocks + (g < examples % blocks) for g in range(blocks)])
    size = counts[:, None].astype(float)
    draws = generator.standard_normal((len(means), blocks, means.shape[1])) / np.sqrt(means.shape[1])
    return size * means[:, None] + np.sqrt(size * noise) * draws, np.tile(counts, (len(means), 1))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def assert_same_bits(first, second, fields=FIELDS):
    for field in fields:
        assert np.array_equal(getattr(first, field), getattr(second, field), equal_nan=True), field


# ---- products
def test_products_are_those_of_the_block_sums():
    sums, counts = draw()
    products, total = block_products(sums, counts), sums.sum(1)

    def assert_products(found, rows):
        length = np.linalg.norm(total, axis=1)
        assert np.abs((found - rows @ rows.T) / np.outer(length, length)).max() < 1e-6

    assert_products(products.total, total)
    assert_products(products.halves[0], sums[:, 0::2].sum(1))
    assert_products(products.halves[1], sums[:, 1::2].sum(1))
    for block in range(8):
        assert_products(products.left_out[block], total - sums[:, block])
    for i in range(len(sums)):
        assert products.within[i] == pytest.approx(sums[i] @ sums[i].T, abs=1e-6 * total[i] @ total[i])


def test_order_and_company_of_the_datasets_change_no_bit():
    sums, counts = draw()
    products, order = block_products(sums, counts), [4, 0, 5, 2, 1, 3]
    assert_same_bits(block_products(sums[order], counts[order]), products.take(order))
    assert_same_bits(block_products(sums[[3]], counts[[3]]), products.take([3]))
    fields = ("gram", "gram_error", "cosine", "error", "similarity", "norm", "signal_fraction", "signal_error")
    whole = conflict_of(products, debias="blocks")
    permuted = conflict_of(products.take(order), debias="blocks")
    for field in fields:
        value = getattr(whole, field)
        assert np.array_equal(getattr(permuted, field), value[np.ix_(*[order] * value.ndim)], equal_nan=True), field
    weights = np.random.default_rng(0).dirichlet(np.ones(6))
    centered = double_center(whole.gram, weights)
    assert np.array_equal(double_center(permuted.gram, weights[order]), centered[np.ix_(order, order)])
    groups = np.array([0, 1, 2, 0, 1, 0])
    share = eta_squared(centered, weights, groups)
    assert eta_squared(centered[np.ix_(order, order)], weights[order], groups[order]) == share


def test_leaving_a_dataset_out_needs_no_second_look_at_the_sums():
    sums, counts = draw()
    rest = [0, 1, 3, 4, 5]
    assert_same_bits(block_products(sums, counts).take(rest), block_products(sums[rest], counts[rest]))


@pytest.mark.parametrize("old", [1, 4, 5])
def test_more_datasets_later_give_the_bits_of_all_at_once(old):
    sums, counts = draw()
    first = block_products(sums[:old], counts[:old])
    grown = extend_products(first, sums, counts)
    assert_same_bits(grown, block_products(sums, counts))
    assert_same_bits(grown.take(range(old)), first)


def test_datasets_that_were_sketched_anew_are_not_extended():
    sums, counts = draw()
    first = block_products(sums[:4], counts[:4])
    with pytest.raises(MeritFastError, match="the first 4 datasets have changed"):
        extend_products(first, sums, counts + 1)


def test_the_order_in_which_a_product_is_summed_changes_no_bit():
    """Columns within a chunk may be shuffled; where all products have one sign, partial sums grow to the full bound."""
    generator = np.random.default_rng(1)
    sums = np.abs(generator.standard_normal((3, 8, 2048))) + 1 / 3
    counts = np.full((3, 8), 4)
    expected = block_products(sums, counts)
    for _ in range(3):
        assert_same_bits(block_products(sums[:, :, generator.permutation(2048)], counts), expected)


def test_threads_change_no_bit():
    script = (
        "import hashlib, numpy as np; from merit_fast.split.moments import block_products;"
        "s = np.random.default_rng(0).standard_normal((90, 4, 5000));"
        "p = block_products(s, np.full((90, 4), 3));"
        "print(hashlib.sha256(p.total.tobytes() + p.left_out.tobytes() + p.within.tobytes()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"OPENBLAS_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in (1, 2)
    }
    assert len(found) == 1


def test_sums_may_stay_on_disk(tmp_path):
    sums, counts = draw()
    files = []
    for i, array in enumerate(sums):
        np.save(tmp_path / f"{i}.npy", array)
        files.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
    assert_same_bits(block_products(files, counts), block_products(sums, counts))


def test_sums_that_are_no_numbers_and_lone_blocks_are_refused():
    sums, counts = draw(3)
    counts[1, 1:] = 0
    with pytest.raises(MeritFastError, match="dataset 1 needs examples in two blocks or more"):
        block_products(sums, counts)
    sums[2, 0, 0] = np.inf
    with pytest.raises(MeritFastError, match="block sums of dataset 2 are not finite"):
        block_products(sums, np.ones_like(counts))


# ---- cosines and their errors
def test_cosine_of_a_zero_row_is_zero():
    assert cosine_matrix(np.array([[0.0, 0], [1, 2]])).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("debias", ["blocks", "none"])
def test_errors_are_the_spread_of_what_they_belong_to(debias):
    generator = np.random.default_rng(1)
    means = unit(generator.standard_normal((1, 40)) + generator.standard_normal((3, 40)))
    found = [conflict_of(block_products(*sample(means, 100, 20, generator)), debias=debias) for _ in range(400)]
    for value, error in (("cosine", "error"), ("gram", "gram_error")):
        spread = np.std([getattr(c, value) for c in found], axis=0)
        stated = np.sqrt(np.mean([np.square(getattr(c, error)) for c in found], axis=0))
        off = ~np.eye(3, dtype=bool)
        assert stated[off] == pytest.approx(spread[off], rel=0.3)
    assert np.diag(stated) == pytest.approx(np.diag(spread), rel=0.3)


def test_a_cosine_lies_within_two_errors_as_often_as_it_should():
    generator = np.random.default_rng(2)
    means = unit(generator.standard_normal((1, 200)) + generator.standard_normal((12, 200)))
    inside, upper = [], np.triu_indices(12, 1)
    for _ in range(40):
        conflict = conflict_of(block_products(*sample(means, 200, 80, generator)), debias="blocks")
        inside.append(np.abs(conflict.cosine - means @ means.T)[upper] <= 2.365 * conflict.error[upper])
    assert 0.93 <= np.mean(inside) <= 0.995  # Student's t with 7 degrees of freedom: 0.95


def test_debiased_cosines_have_the_slope_of_the_truth_and_naive_ones_have_not():
    generator = np.random.default_rng(3)
    means = unit(generator.standard_normal((20, 3)) @ generator.standard_normal((3, 300)))
    upper = np.triu_indices(20, 1)
    truth = (means @ means.T)[upper]
    slopes = {"blocks": [], "none": []}
    for _ in range(20):
        products = block_products(*sample(means, 200, 80, generator))
        for debias, found in slopes.items():
            found.append(np.polyfit(truth, conflict_of(products, debias=debias).similarity[upper], 1)[0])
    assert np.mean(slopes["blocks"]) == pytest.approx(1.0, abs=0.03)
    assert np.mean(slopes["none"]) == pytest.approx(1 / (1 + 80 / 200), abs=0.03)


def test_a_dataset_of_noise_has_no_cosine_and_keeps_out_of_the_partition():
    generator = np.random.default_rng(4)
    means = unit(generator.standard_normal((4, 500)))
    means[2] = 0
    conflict = conflict_of(block_products(*sample(means, 100, 30, generator)), debias="blocks")
    assert conflict.resolved.tolist() == [True, True, False, True]
    assert conflict.more_examples[2] >= 100 and conflict.more_examples[[0, 1, 3]].tolist() == [0, 0, 0]
    assert conflict.describe_signal(0).startswith("signal fraction 0.7")
    more = conflict.more_examples[2]
    assert conflict.describe_signal(2) == f"not resolvable: needs at least {more} more examples"
    hidden = np.zeros((4, 4), bool)
    hidden[2] = hidden[:, 2] = True
    assert np.array_equal(np.isnan(conflict.cosine), hidden) and np.array_equal(np.isnan(conflict.error), hidden)
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
    assert not two.resolved.any() and (two.more_examples > 0).all() and np.isfinite(two.similarity).all()


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
    assert np.mean(conflict.signal_fraction * conflict.norm**2) == pytest.approx(means[0] @ means[0], rel=0.05)
    assert conflict.signal_fraction.std() == pytest.approx(np.sqrt(np.mean(conflict.signal_error**2)), rel=0.3)
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
    rows, weights = generator.standard_normal((7, 12)), generator.dirichlet(np.ones(7))
    rest = rows - weights @ rows
    assert center_matrix(rows @ rows.T, weights, "tokens") == pytest.approx(rest @ rest.T)
    cosine = cosine_matrix(rows)
    assert center_matrix(cosine, weights, "columns") == pytest.approx(cosine - cosine.mean(0))


def test_rows_spread_over_all_groups_count_in_each():
    generator = np.random.default_rng(10)
    rows, weights = generator.standard_normal((5, 12)), generator.dirichlet(np.ones(5))
    rows -= weights @ rows
    halves = np.concatenate([rows[:4], rows[4:], rows[4:]])
    shared = np.concatenate([weights[:4], weights[4:] / 2, weights[4:] / 2])
    expected = between_sum(halves @ halves.T, shared, [0, 1, 0, 1, 0, 1])
    assert between_sum(rows @ rows.T, weights, [0, 1, 0, 1, -1]) == pytest.approx(expected)
    assert between_sum(rows @ rows.T, weights, [-1] * 5) == pytest.approx(0, abs=1e-12)


def judge(sums, counts, seed=0, **options):
    """separation() of a PCA median split in four, and the debiased eta squared of a known truth for it."""
    names, weights = [f"d{i:02}" for i in range(len(sums))], np.full(len(sums), 1 / len(sums))
    generator, products = np.random.default_rng(seed), block_products(sums, counts)

    def split(matrix):
        shares = double_center(matrix, weights) * np.outer(weights, weights)
        return median_partition(weighted_axes(shares, weights, 2).scores, weights, names).groups

    drawn = iter(random_groups(weights, names, 4, 2 * 60, tolerance=np.inf, seed=int(generator.integers(1 << 30))))

    def random():
        return next(drawn)

    groups = split(conflict_of(products, debias="blocks").similarity)
    return separation(products, weights, groups, split, random, draws=60, **options), groups, weights


def test_eta_squared_of_a_found_split_is_honest():
    generator, found = np.random.default_rng(11), []
    for _ in range(25):
        axes = generator.standard_normal((20, 2)) @ generator.standard_normal((2, 400))
        means = unit(axes + generator.standard_normal((20, 400)))
        result, groups, weights = judge(*sample(means, 64, 80, generator))
        truth = eta_squared(double_center(means @ means.T, weights), weights, groups)
        found.append((truth, result.eta_squared, result.cross_validated, result.null_mean))
        assert result.better_than_random
    truth, eta, crossed, null = np.mean(found, axis=0)
    assert eta == pytest.approx(truth, abs=0.04) and crossed == pytest.approx(truth, abs=0.04)
    assert eta > crossed
    assert null == pytest.approx(3 / 19, abs=0.02)  # K - 1 of N - 1 directions


@pytest.mark.parametrize("similarity", ["cosine", "gram"])
def test_a_split_of_noise_is_not_called_better_than_random(similarity):
    """All datasets have one and the same mean gradient: whatever differs is noise."""
    generator = np.random.default_rng(12)
    means = np.tile(unit(generator.standard_normal((1, 400))), (20, 1))
    called = [judge(*sample(means, 64, 80, generator), similarity=similarity)[0] for _ in range(30)]
    assert sum(result.better_than_random for result in called) <= 3


def test_eta_squared_stays_unknown_where_halves_cannot_tell():
    means = np.random.default_rng(13).standard_normal((8, 200))
    result, *_ = judge(*sample(means, 60, 1.0, np.random.default_rng(13), blocks=3))
    assert np.isfinite(result.eta_squared) and np.isnan(result.cross_validated) and not result.better_than_random
    same = np.tile(np.arange(1.0, 201), (8, 8, 1))
    assert not judge(same, np.ones((8, 8)))[0].better_than_random


def test_pairs_are_summed_up_within_and_across_groups():
    cosine = np.array([[1, 0.5, -0.3, np.nan], [0.5, 1, -0.1, np.nan], [-0.3, -0.1, 1, np.nan], [np.nan] * 4])
    assert pair_means(cosine, [0, 0, 1, 1]) == pytest.approx((0.5, -0.2, 1.0))
    assert pair_means(cosine, [0, 1, 0, 1]) == pytest.approx((-0.3, 0.2, 0.5))
    assert np.isnan(pair_means(cosine, [0, 1, 2, 2])[0])
