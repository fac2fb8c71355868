"""Partitions: the objective, the search against all possible splits, and the balance."""

import itertools
import math

import numpy as np
import pytest
from support.split.partitions import NAMES, mixture, split

from merit_fast.split.search import step, swap
from merit_fast.split.search.objective import between_sum, double_center
from merit_fast.split.search.problem import Pins, pose_problem
from merit_fast.split.search.step import Step

BALANCED = ("pca-swap", "pddp", "kmeans", "random", "anti")


def imbalance(partition):
    return max(abs(weight - 1 / len(partition.group_weights)) for weight in partition.group_weights)


def every_split(number, groups):
    """All ways to part datasets into groups, none empty, groups alike."""
    labels = [[0]]
    for _ in range(number - 1):
        labels = [row + [k] for row in labels for k in range(min(max(row) + 2, groups))]
    return [row for row in labels if max(row) == groups - 1]


# ---- the objective
@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_the_objective_is_the_between_group_sum_of_squares(groups):
    similarity, weights = mixture(0, 12)
    partition = split(similarity, weights, groups)
    assert partition.objective == pytest.approx(
        between_sum(similarity, weights, partition.labels), rel=1e-9, abs=1e-12
    )
    shares = [
        sum(w for w, g in zip(weights, partition.labels, strict=True) if g == k)
        for k in range(groups)
    ]
    assert partition.group_weights == pytest.approx(shares)


def test_a_margin_is_what_moving_the_dataset_costs():
    similarity, weights = mixture(1, 9)
    partition = split(similarity, weights, 3)
    for i, margin in enumerate(partition.margins):
        moved = [
            [*partition.labels[:i], k, *partition.labels[i + 1 :]]
            for k in range(3)
            if k != partition.labels[i]
        ]
        best = max(between_sum(similarity, weights, labels) for labels in moved)
        assert margin == pytest.approx(partition.objective - best, abs=1e-12)
    assert split(similarity, weights, 1).margins == (0.0,) * 9
    # A dataset by itself in a group: its margin is the cost of joining another.
    assert len(set(split(similarity[:3, :3], weights[:3], 3).margins)) == 3


def test_datasets_pinned_together_share_their_margin():
    similarity, weights = mixture(2, 8)
    pins = Pins(together=(("d00", "d05"),))
    partition = split(similarity, weights, 2, pins=pins)
    moved = list(partition.labels)
    moved[0] = moved[5] = 1 - moved[0]
    cost = partition.objective - between_sum(similarity, weights, moved)
    assert partition.margins[0] == partition.margins[5] == pytest.approx(cost)


# ---- the search
@pytest.mark.parametrize(
    "number,groups,spread", [(10, 2, 0.0), (10, 2, 0.4), (9, 3, 0.4), (8, 4, 0.0), (6, 5, 0.4)]
)
def test_the_search_finds_the_best_and_the_worst_of_all_splits(number, groups, spread):
    every = np.array(every_split(number, groups))
    best_found = worst_found = 0
    for seed in range(10):
        similarity, weights = mixture(seed, number, spread=spread)
        off = np.zeros(len(every))
        values = np.zeros(len(every))
        for k in range(groups):
            inside = (every == k) * weights
            off = np.maximum(off, np.abs(inside.sum(1) - 1 / groups))
            values += np.einsum("ln,nm,lm->l", inside, similarity, inside) / inside.sum(1)
        tolerance = 0.1 / groups
        allowed = values[off <= max(tolerance, off.min()) + 1e-9]
        best_found += split(
            similarity, weights, groups, tolerance=tolerance
        ).objective > allowed.max() * (1 - 1e-9)
        anti = split(similarity, weights, groups, "anti", tolerance=tolerance)
        worst_found += anti.objective < allowed.min() + 1e-9 * allowed.max()
    assert best_found >= 9 and worst_found >= 9


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_start_is_improved_or_kept_and_stays_balanced(sign):
    generator = np.random.default_rng(3)
    for seed in range(10):
        similarity, weights = mixture(seed, 24)
        problem = pose_problem(similarity, weights, NAMES[:24], 4, Pins(), ())
        start = generator.permutation(np.arange(24) % 4)
        limit = max(0.02, swap.imbalance(problem, start))
        climbed = swap.climb(problem, start, limit, sign)
        assert sign * swap.between_groups(problem, climbed) >= sign * swap.between_groups(
            problem, start
        )
        assert swap.imbalance(problem, climbed) <= limit + 1e-12
        assert (swap.climb(problem, climbed, limit, sign) == climbed).all()


def test_gains_of_moves_and_swaps_are_differences_of_the_objective():
    similarity, weights = mixture(4, 7)
    problem = pose_problem(similarity, weights, NAMES[:7], 3, Pins(), ())
    labels = np.array([0, 1, 2, 0, 1, 0, 1])  # the third is by itself in its group
    step = Step(problem, labels)
    now = swap.between_groups(problem, labels)
    for i, k in itertools.product(range(7), range(3)):
        if labels[i] != k:
            moved = np.where(np.arange(7) == i, k, labels)
            assert step.move_gains()[i, k] == pytest.approx(
                swap.between_groups(problem, moved) - now, abs=1e-12
            )
    (block,) = step.swap_blocks()
    gains = step.swap_gains(block)
    for i, j in itertools.combinations(range(7), 2):
        if labels[i] != labels[j]:
            swapped = labels.copy()
            swapped[[i, j]] = labels[[j, i]]
            expected = swap.between_groups(problem, swapped) - now
            assert gains[i, j] == pytest.approx(expected, abs=1e-12)


def test_swaps_of_many_items_in_blocks_are_those_of_one_table(monkeypatch):
    similarity, weights = mixture(5, 40)
    pins = Pins(apart=(("d00", "d07", "d12"),), group={"d03": 1})
    problem = pose_problem(similarity, weights, NAMES[:40], 4, pins, ())
    labels = swap.obey(problem, np.random.default_rng(0).permutation(np.arange(40) % 4))
    taken = Step(problem, labels)
    (whole,) = taken.swap_blocks()
    table = np.where(taken.swappable(whole, 0.05), taken.swap_gains(whole), -np.inf)
    monkeypatch.setattr(step, "_ONE_BLOCK", 4)
    blocks = list(taken.swap_blocks())
    assert len(blocks) == 3
    found = {}
    for block in blocks:
        gains = np.where(taken.swappable(block, 0.05), taken.swap_gains(block), -np.inf)
        for (i, j), gain in np.ndenumerate(gains):
            found[frozenset((block.rows[i], block.columns[j]))] = gain
    free = whole.rows
    for (i, j), gain in np.ndenumerate(table):
        if labels[free[i]] != labels[free[j]]:
            assert found[frozenset((free[i], free[j]))] == pytest.approx(gain, abs=1e-12)


def test_a_walk_of_moves_and_swaps_keeps_the_figures_of_a_fresh_step():
    similarity, weights = mixture(6, 30)
    problem = pose_problem(similarity, weights, NAMES[:30], 3, Pins(), ())
    generator = np.random.default_rng(1)
    walked = Step(problem, np.arange(30) % 3)
    for _ in range(200):
        first, second = generator.choice(30, 2, replace=False)
        if walked.labels[first] != walked.labels[second]:
            walked.swap(first, second)
        elif walked.size[walked.labels[first]] > 1:
            walked.move(first, (walked.labels[first] + 1) % 3)
    fresh = Step(problem, walked.labels)
    assert np.allclose(walked.move_gains(), fresh.move_gains(), rtol=0, atol=1e-13)
    assert np.allclose(walked.weight, fresh.weight) and (walked.size == fresh.size).all()


@pytest.mark.parametrize("groups", [2, 4, 5])
def test_the_default_is_at_least_as_good_as_every_other_method_within_the_tolerance(groups):
    for seed in range(2):
        similarity, weights = mixture(seed, 30)
        best = split(similarity, weights, groups)
        for method in ("pddp", "kmeans", "random", "text-cluster"):
            other = split(similarity, weights, groups, method)
            assert imbalance(other) > 0.05 / groups + 1e-9 or other.objective <= best.objective * (
                1 + 1e-9
            )


# ---- balance
@pytest.mark.parametrize("method", BALANCED)
@pytest.mark.parametrize("groups", [2, 3, 4, 8])
def test_groups_keep_the_tolerance(method, groups):
    similarity, weights = mixture(5, 40)
    partition = split(similarity, weights, groups, method)
    assert imbalance(partition) <= 0.05 / groups + 1e-9 and partition.note == ""
    assert set(partition.labels) == set(range(groups))


def test_without_balance_kmeans_may_follow_the_clusters():
    z = np.array([[5.0, 0], [5.1, 0], [4.9, 0], [5, 0.1], [5, -0.1], [5, 0], [5, 0.05], [-5, 0]])
    weights = np.full(8, 1 / 8)
    similarity = double_center(z @ z.T, weights)
    free = split(similarity, weights, 2, "kmeans", tolerance=math.inf)
    assert sorted(free.group_weights) == [1 / 8, 7 / 8] and free.note == ""
    assert split(similarity, weights, 2, "kmeans").group_weights == (0.5, 0.5)
    assert split(similarity, weights, 2, tolerance=math.inf).labels == free.labels


def test_one_huge_dataset_gets_the_nearest_balance_and_a_sentence():
    similarity, weights = mixture(6, 9)
    weights = np.where(np.arange(9) == 3, 0.6, 0.4 * weights / np.delete(weights, 3).sum())
    partition = split(similarity, weights, 2)
    assert partition.labels.count(partition.labels[3]) == 1
    assert sorted(partition.group_weights) == pytest.approx([0.4, 0.6])
    assert (
        "the tolerance of 0.025 is not kept" in partition.note
        and "d03 with 0.600" in partition.note
    )


def test_rows_of_a_huge_dataset_are_spread_only_when_asked():
    similarity, weights = mixture(6, 9)
    weights = np.where(np.arange(9) == 3, 0.6, 0.4 * weights / np.delete(weights, 3).sum())
    similarity = double_center(similarity, weights)
    partition = split(similarity, weights, 2, spread=["d03"], tolerance=0.05)
    assert partition.labels[3] == -1 and -1 not in partition.labels[:3] + partition.labels[4:]
    assert (
        imbalance(partition) <= 0.05 + 1e-9 and partition.note == "" and partition.margins[3] == 0.0
    )
    share = (
        np.array([[0.5, 0.5] if g == -1 else [g == 0, g == 1] for g in partition.labels])
        * weights[:, None]
    )
    explicit = sum(share[:, k] @ similarity @ share[:, k] / share[:, k].sum() for k in range(2))
    assert partition.objective == pytest.approx(explicit)


def test_iid_spreads_all_and_parts_nothing():
    similarity, weights = mixture(7, 6)
    partition = split(similarity, weights, 3, "iid")
    assert partition.labels == (-1,) * 6 and partition.objective == pytest.approx(0, abs=1e-12)
    assert partition.group_weights == pytest.approx([1 / 3] * 3)
