"""Groups: the objective, the search against every split there is, balance and invariance."""

import itertools
import math

import numpy as np
import pytest
from support.partitions import NAMES, mixture, split

from merit_fast.errors import InputError
from merit_fast.split.conflict import between_sum, cosine_matrix, double_center
from merit_fast.split.search import swap
from merit_fast.split.search.methods import METHODS
from merit_fast.split.search.partition import partition_datasets
from merit_fast.split.search.problem import Pins, pose_problem

BALANCED = ("pca-swap", "pddp", "kmeans", "random", "anti")


def imbalance(found):
    return max(abs(weight - 1 / len(found.group_weights)) for weight in found.group_weights)


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
    found = split(similarity, weights, groups)
    assert found.objective == pytest.approx(
        between_sum(similarity, weights, found.labels), rel=1e-9, abs=1e-12
    )
    shares = [
        sum(w for w, g in zip(weights, found.labels, strict=True) if g == k) for k in range(groups)
    ]
    assert found.group_weights == pytest.approx(shares)


def test_a_margin_is_what_moving_the_dataset_costs():
    similarity, weights = mixture(1, 9)
    found = split(similarity, weights, 3)
    for i, margin in enumerate(found.margins):
        moved = [
            [*found.labels[:i], k, *found.labels[i + 1 :]] for k in range(3) if k != found.labels[i]
        ]
        best = max(between_sum(similarity, weights, labels) for labels in moved)
        assert margin == pytest.approx(found.objective - best, abs=1e-12)
    assert split(similarity, weights, 1).margins == (0.0,) * 9
    assert (
        len(set(split(similarity[:3, :3], weights[:3], 3).margins)) == 3
    )  # alone in a group: what joining costs


def test_datasets_pinned_together_share_their_margin():
    similarity, weights = mixture(2, 8)
    pins = Pins(together=(("d00", "d05"),))
    found = split(similarity, weights, 2, pins=pins)
    moved = list(found.labels)
    moved[0] = moved[5] = 1 - moved[0]
    cost = found.objective - between_sum(similarity, weights, moved)
    assert found.margins[0] == found.margins[5] == pytest.approx(cost)


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
        found = swap.climb(problem, start, limit, sign)
        assert sign * swap.between_groups(problem, found) >= sign * swap.between_groups(
            problem, start
        )
        assert swap.imbalance(problem, found) <= limit + 1e-12
        assert (swap.climb(problem, found, limit, sign) == found).all()


def test_gains_of_moves_and_swaps_are_differences_of_the_objective():
    similarity, weights = mixture(4, 7)
    problem = pose_problem(similarity, weights, NAMES[:7], 3, Pins(), ())
    labels = np.array([0, 1, 2, 0, 1, 0, 1])  # the third is alone in its group
    step = swap._Step(problem, labels)
    now = swap.between_groups(problem, labels)
    for i, k in itertools.product(range(7), range(3)):
        if labels[i] != k:
            moved = np.where(np.arange(7) == i, k, labels)
            assert step.move_gains()[i, k] == pytest.approx(
                swap.between_groups(problem, moved) - now, abs=1e-12
            )
    for i, j in itertools.combinations(range(7), 2):
        if labels[i] != labels[j]:
            swapped = labels.copy()
            swapped[[i, j]] = labels[[j, i]]
            assert step.swap_gains()[i, j] == pytest.approx(
                swap.between_groups(problem, swapped) - now, abs=1e-12
            )


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
    found = split(similarity, weights, groups, method)
    assert imbalance(found) <= 0.05 / groups + 1e-9 and found.note == ""
    assert set(found.labels) == set(range(groups))


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
    found = split(similarity, weights, 2)
    assert found.labels.count(found.labels[3]) == 1
    assert sorted(found.group_weights) == pytest.approx([0.4, 0.6])
    assert "the tolerance of 0.025 is not kept" in found.note and "d03 with 0.600" in found.note


def test_rows_of_a_huge_dataset_are_spread_only_when_asked():
    similarity, weights = mixture(6, 9)
    weights = np.where(np.arange(9) == 3, 0.6, 0.4 * weights / np.delete(weights, 3).sum())
    similarity = double_center(similarity, weights)
    found = split(similarity, weights, 2, spread=["d03"], tolerance=0.05)
    assert found.labels[3] == -1 and -1 not in found.labels[:3] + found.labels[4:]
    assert imbalance(found) <= 0.05 + 1e-9 and found.note == "" and found.margins[3] == 0.0
    share = (
        np.array([[0.5, 0.5] if g == -1 else [g == 0, g == 1] for g in found.labels])
        * weights[:, None]
    )
    explicit = sum(share[:, k] @ similarity @ share[:, k] / share[:, k].sum() for k in range(2))
    assert found.objective == pytest.approx(explicit)


def test_iid_spreads_all_and_parts_nothing():
    similarity, weights = mixture(7, 6)
    found = split(similarity, weights, 3, "iid")
    assert found.labels == (-1,) * 6 and found.objective == pytest.approx(0, abs=1e-12)
    assert found.group_weights == pytest.approx([1 / 3] * 3)


# ---- invariance
@pytest.mark.parametrize("method", [m for m in METHODS if m != "manual"])
@pytest.mark.parametrize("groups", [2, 4])
def test_the_order_of_the_datasets_never_matters(method, groups):
    similarity, weights = mixture(8, 18)
    order = np.random.default_rng(0).permutation(18)
    names = [NAMES[i] for i in order]
    shuffled = similarity[np.ix_(order, order)]
    text = {"text_similarity": shuffled} if method == "text-cluster" else {}
    other = partition_datasets(shuffled, weights[order], names, groups, method, **text)
    found = split(similarity, weights, groups, method)
    assert [found.labels[i] for i in order] == list(other.labels)
    assert [found.margins[i] for i in order] == pytest.approx(other.margins, abs=1e-12)


@pytest.mark.parametrize("method", ["pca-swap", "pca-median", "pddp"])
def test_the_sign_of_an_axis_never_matters(method, monkeypatch):
    similarity, weights = mixture(9, 16, dimensions=6)
    found = split(similarity, weights, 4, method)
    eigh = np.linalg.eigh
    svd = np.linalg.svd

    def turned_eigh(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * np.where(np.arange(len(values)) % 2, 1.0, -1.0)

    def turned_svd(matrix, **options):
        left, singular, right = svd(matrix, **options)
        return -left, singular, -right

    monkeypatch.setattr(np.linalg, "eigh", turned_eigh)
    monkeypatch.setattr(np.linalg, "svd", turned_svd)
    assert split(similarity, weights, 4, method).labels == found.labels


def test_scale_changes_nothing_and_seeds_change_random_groups():
    similarity, weights = mixture(10, 20)
    assert split(similarity * 1e6, weights, 4).labels == split(similarity, weights * 37, 4).labels
    one, two = (split(similarity, weights, 4, "random", seed=seed).labels for seed in (0, 1))
    assert one != two and one == split(similarity, weights, 4, "random", seed=0).labels


def test_groups_are_numbered_by_their_first_dataset():
    similarity, weights = mixture(11, 20)
    for method in ("pca-swap", "kmeans", "random"):
        groups = split(similarity, weights, 5, method).labels
        assert list(dict.fromkeys(groups)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", ["pca-swap", "pca-median", "pddp", "kmeans"])
def test_twins_stay_and_opposites_part(method):
    generator = np.random.default_rng(2)
    directions = generator.standard_normal((4, 30))
    rows = np.concatenate(
        [
            directions,
            directions + 1e-3 * generator.standard_normal((4, 30)),
            -directions,
            -directions,
        ]
    )
    weights = np.full(16, 1 / 16)
    cosine = cosine_matrix(rows)
    groups = split(double_center(cosine, weights), weights, 2, method, uncentered=cosine).labels
    for i in range(4):
        assert groups[i] == groups[i + 4]
        assert groups[8 + i] == groups[12 + i] != groups[i]


# ---- what a caller may give
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number,groups", [(1, 1), (2, 1), (2, 2), (3, 2), (4, 4), (5, 4), (9, 8)])
def test_every_method_fills_every_group_of_a_small_mixture(method, number, groups):
    similarity, weights = mixture(number, number)
    found = split(similarity, weights, groups, method)
    assert set(found.labels) == ({-1} if method == "iid" and groups > 1 else set(range(groups)))
    assert np.isfinite(found.margins).all() and sum(found.group_weights) == pytest.approx(1)


@pytest.mark.parametrize("method", METHODS)
def test_degenerate_similarities_still_give_full_balanced_groups(method):
    weights = np.full(8, 1 / 8)
    generator = np.random.default_rng(0)
    indefinite = generator.standard_normal((8, 8))
    duplicates = np.tile(generator.standard_normal((4, 5)), (2, 1))
    for similarity in (
        np.zeros((8, 8)),
        -np.eye(8),
        double_center(indefinite + indefinite.T, weights),
        double_center(duplicates @ duplicates.T, weights),
        1e-300 * np.eye(8),
    ):
        found = split(similarity, weights, 4, method)
        assert np.isfinite([found.objective, *found.margins]).all()
        if method != "iid":
            assert np.bincount(found.labels).tolist() == [2, 2, 2, 2]


def test_manual_groups_are_taken_as_they_are():
    similarity, weights = mixture(13, 5)
    manual = [["d04", "d01"], ["d00", "d02", "d03"]]
    found = partition_datasets(similarity, weights, NAMES[:5], 2, "manual", manual=manual)
    assert found.labels == (1, 0, 1, 1, 0) and "is not kept" in found.note


@pytest.mark.parametrize(
    "manual,message",
    [
        (None, "manual: must list the datasets of 2 groups, got None"),
        ([["d00", "d01"], []], r"manual: must name every dataset, got none of \['d02'\]"),
        ([["d00", "d01", "d02"], []], "manual: no group may be empty, got group 1"),
        ([["d00", "d01"], ["d02", "d01"]], "manual: d01 must be in one group, got 0 and 1"),
        ([["d00", "d01"], ["d02", "x"]], "must be a dataset of the mixture, got 'x'"),
    ],
)
def test_manual_groups_are_checked(manual, message):
    with pytest.raises(InputError, match=message):
        partition_datasets(*mixture(0, 3), NAMES[:3], 2, "manual", manual=manual)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"num_groups": 5}, r"groups: must be at most the number of datasets \(4\), got 5"),
        ({"num_groups": 0}, "groups: must be at least 1, got 0"),
        (
            {"num_groups": 3, "method": "pca-median"},
            "groups: must be a power of two with method pca-median, got 3",
        ),
        ({"method": "magic"}, "method: must be one of pca-swap, .* got 'magic'"),
        (
            {"method": "text-cluster"},
            "text-cluster: must be given the similarity of the datasets' texts",
        ),
        ({"tolerance": -0.1}, "tolerance: must be 0 or more, got -0.1"),
        ({"tolerance": math.nan}, "tolerance: must be 0 or more, got nan"),
        ({"names": ["a", "b", "b", "c"]}, "names: must be distinct and at least one, got 'b'"),
        ({"weights": np.array([1.0, 2, 0, 1])}, "weights: must be one positive number per dataset"),
        ({"similarity": np.full((4, 4), np.nan)}, r"similarity: must be finite and \[4, 4\]"),
        (
            {"similarity": np.zeros((3, 3))},
            r"similarity: must be finite and \[4, 4\], got \[3, 3\]",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(changes, message):
    similarity, weights = mixture(0, 4)
    call = {
        "similarity": similarity,
        "weights": weights,
        "names": NAMES[:4],
        "num_groups": 2,
        **changes,
    }
    with pytest.raises(InputError, match=message):
        partition_datasets(**call)
