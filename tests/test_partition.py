"""Groups: the objective, the search against every split there is, balance, pins, and the paper's worked example."""

import itertools
import math

import numpy as np
import pytest

from merit_fast.config import parse
from merit_fast.errors import InputError
from merit_fast.split import swap
from merit_fast.split.conflict import between_sum, cosine_matrix, double_center, eta_squared
from merit_fast.split.medians import conflict_axes, median_partition
from merit_fast.split.partition import METHODS, Pins, partition, random_groups
from merit_fast.split.pins import pose_problem

NAMES = [f"d{i:02}" for i in range(40)]
BALANCED = ("pca-swap", "pddp", "kmeans", "random", "anti")


def mixture(seed, number, *, spread=0.4, dimensions=3):
    """Centred inner products and weights of datasets with one strong conflict axis."""
    generator = np.random.default_rng(seed)
    z = generator.standard_normal((number, dimensions))
    z += 2 * generator.standard_normal((number, 1)) * generator.standard_normal(dimensions)
    weights = np.exp(spread * generator.standard_normal(number))
    weights /= weights.sum()
    return double_center(z @ z.T, weights), weights


def split(similarity, weights, groups, method="pca-swap", **options):
    if method == "text-cluster":
        options["text_similarity"] = similarity
    if method == "manual":
        options["manual"] = [NAMES[k : len(weights) : groups] for k in range(groups)]
    return partition(similarity, weights, NAMES[: len(weights)], groups, method, **options)


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
    assert found.objective == pytest.approx(between_sum(similarity, weights, found.groups), rel=1e-9, abs=1e-12)
    shares = [sum(w for w, g in zip(weights, found.groups, strict=True) if g == k) for k in range(groups)]
    assert found.group_weights == pytest.approx(shares)


def test_a_margin_is_what_moving_the_dataset_costs():
    similarity, weights = mixture(1, 9)
    found = split(similarity, weights, 3)
    for i, margin in enumerate(found.margins):
        moved = [[*found.groups[:i], k, *found.groups[i + 1 :]] for k in range(3) if k != found.groups[i]]
        best = max(between_sum(similarity, weights, labels) for labels in moved)
        assert margin == pytest.approx(found.objective - best, abs=1e-12)
    assert split(similarity, weights, 1).margins == (0.0,) * 9
    assert len(set(split(similarity[:3, :3], weights[:3], 3).margins)) == 3  # alone in a group: what joining costs


def test_datasets_pinned_together_share_their_margin():
    similarity, weights = mixture(2, 8)
    pins = Pins(together=(("d00", "d05"),))
    found = split(similarity, weights, 2, pins=pins)
    moved = list(found.groups)
    moved[0] = moved[5] = 1 - moved[0]
    cost = found.objective - between_sum(similarity, weights, moved)
    assert found.margins[0] == found.margins[5] == pytest.approx(cost)


# ---- the search
@pytest.mark.parametrize("number,groups,spread", [(10, 2, 0.0), (10, 2, 0.4), (9, 3, 0.4), (8, 4, 0.0), (6, 5, 0.4)])
def test_the_search_finds_the_best_and_the_worst_of_all_splits(number, groups, spread):
    every = np.array(every_split(number, groups))
    best_found = worst_found = 0
    for seed in range(10):
        similarity, weights = mixture(seed, number, spread=spread)
        off, values = np.zeros(len(every)), np.zeros(len(every))
        for k in range(groups):
            inside = (every == k) * weights
            off = np.maximum(off, np.abs(inside.sum(1) - 1 / groups))
            values += np.einsum("ln,nm,lm->l", inside, similarity, inside) / inside.sum(1)
        tolerance = 0.1 / groups
        allowed = values[off <= max(tolerance, off.min()) + 1e-9]
        best_found += split(similarity, weights, groups, tolerance=tolerance).objective > allowed.max() * (1 - 1e-9)
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
        assert sign * swap.between_groups(problem, found) >= sign * swap.between_groups(problem, start)
        assert swap.imbalance(problem, found) <= limit + 1e-12
        assert (swap.climb(problem, found, limit, sign) == found).all()


def test_gains_of_moves_and_swaps_are_differences_of_the_objective():
    similarity, weights = mixture(4, 7)
    problem = pose_problem(similarity, weights, NAMES[:7], 3, Pins(), ())
    labels = np.array([0, 1, 2, 0, 1, 0, 1])  # the third is alone in its group
    step, now = swap._Step(problem, labels), swap.between_groups(problem, labels)
    for i, k in itertools.product(range(7), range(3)):
        if labels[i] != k:
            moved = np.where(np.arange(7) == i, k, labels)
            assert step.move_gains()[i, k] == pytest.approx(swap.between_groups(problem, moved) - now, abs=1e-12)
    for i, j in itertools.combinations(range(7), 2):
        if labels[i] != labels[j]:
            swapped = labels.copy()
            swapped[[i, j]] = labels[[j, i]]
            assert step.swap_gains()[i, j] == pytest.approx(swap.between_groups(problem, swapped) - now, abs=1e-12)


@pytest.mark.parametrize("groups", [2, 4, 5])
def test_the_default_is_at_least_as_good_as_every_other_method_within_the_tolerance(groups):
    for seed in range(2):
        similarity, weights = mixture(seed, 30)
        best = split(similarity, weights, groups)
        for method in ("pddp", "kmeans", "random", "text-cluster"):
            other = split(similarity, weights, groups, method)
            assert imbalance(other) > 0.05 / groups + 1e-9 or other.objective <= best.objective * (1 + 1e-9)


# ---- balance
@pytest.mark.parametrize("method", BALANCED)
@pytest.mark.parametrize("groups", [2, 3, 4, 8])
def test_groups_keep_the_tolerance(method, groups):
    similarity, weights = mixture(5, 40)
    found = split(similarity, weights, groups, method)
    assert imbalance(found) <= 0.05 / groups + 1e-9 and found.note == ""
    assert set(found.groups) == set(range(groups))


def test_without_balance_kmeans_may_follow_the_clusters():
    z = np.array([[5.0, 0], [5.1, 0], [4.9, 0], [5, 0.1], [5, -0.1], [5, 0], [5, 0.05], [-5, 0]])
    weights = np.full(8, 1 / 8)
    similarity = double_center(z @ z.T, weights)
    free = split(similarity, weights, 2, "kmeans", tolerance=math.inf)
    assert sorted(free.group_weights) == [1 / 8, 7 / 8] and free.note == ""
    assert split(similarity, weights, 2, "kmeans").group_weights == (0.5, 0.5)
    assert split(similarity, weights, 2, tolerance=math.inf).groups == free.groups


def test_one_huge_dataset_gets_the_nearest_balance_and_a_sentence():
    similarity, weights = mixture(6, 9)
    weights = np.where(np.arange(9) == 3, 0.6, 0.4 * weights / np.delete(weights, 3).sum())
    found = split(similarity, weights, 2)
    assert found.groups.count(found.groups[3]) == 1
    assert sorted(found.group_weights) == pytest.approx([0.4, 0.6])
    assert "the tolerance of 0.025 is not kept" in found.note and "d03 with 0.600" in found.note


def test_rows_of_a_huge_dataset_are_spread_only_when_asked():
    similarity, weights = mixture(6, 9)
    weights = np.where(np.arange(9) == 3, 0.6, 0.4 * weights / np.delete(weights, 3).sum())
    similarity = double_center(similarity, weights)
    found = split(similarity, weights, 2, spread=["d03"], tolerance=0.05)
    assert found.groups[3] == -1 and -1 not in found.groups[:3] + found.groups[4:]
    assert imbalance(found) <= 0.05 + 1e-9 and found.note == "" and found.margins[3] == 0.0
    share = np.array([[0.5, 0.5] if g == -1 else [g == 0, g == 1] for g in found.groups]) * weights[:, None]
    explicit = sum(share[:, k] @ similarity @ share[:, k] / share[:, k].sum() for k in range(2))
    assert found.objective == pytest.approx(explicit)


def test_iid_spreads_all_and_parts_nothing():
    similarity, weights = mixture(7, 6)
    found = split(similarity, weights, 3, "iid")
    assert found.groups == (-1,) * 6 and found.objective == pytest.approx(0, abs=1e-12)
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
    other = partition(shuffled, weights[order], names, groups, method, **text)
    found = split(similarity, weights, groups, method)
    assert [found.groups[i] for i in order] == list(other.groups)
    assert [found.margins[i] for i in order] == pytest.approx(other.margins, abs=1e-12)


@pytest.mark.parametrize("method", ["pca-swap", "pca-median", "pddp"])
def test_the_sign_of_an_axis_never_matters(method, monkeypatch):
    similarity, weights = mixture(9, 16, dimensions=6)
    found = split(similarity, weights, 4, method)
    eigh, svd = np.linalg.eigh, np.linalg.svd

    def turned_eigh(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * np.where(np.arange(len(values)) % 2, 1.0, -1.0)

    def turned_svd(matrix, **options):
        left, singular, right = svd(matrix, **options)
        return -left, singular, -right

    monkeypatch.setattr(np.linalg, "eigh", turned_eigh)
    monkeypatch.setattr(np.linalg, "svd", turned_svd)
    assert split(similarity, weights, 4, method).groups == found.groups


def test_scale_changes_nothing_and_seeds_change_random_groups():
    similarity, weights = mixture(10, 20)
    assert split(similarity * 1e6, weights, 4).groups == split(similarity, weights * 37, 4).groups
    one, two = (split(similarity, weights, 4, "random", seed=seed).groups for seed in (0, 1))
    assert one != two and one == split(similarity, weights, 4, "random", seed=0).groups


def test_groups_are_numbered_by_their_first_dataset():
    similarity, weights = mixture(11, 20)
    for method in ("pca-swap", "kmeans", "random"):
        groups = split(similarity, weights, 5, method).groups
        assert list(dict.fromkeys(groups)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", ["pca-swap", "pca-median", "pddp", "kmeans"])
def test_twins_stay_and_opposites_part(method):
    generator = np.random.default_rng(2)
    directions = generator.standard_normal((4, 30))
    rows = np.concatenate(
        [directions, directions + 1e-3 * generator.standard_normal((4, 30)), -directions, -directions]
    )
    weights = np.full(16, 1 / 16)
    cosine = cosine_matrix(rows)
    groups = split(double_center(cosine, weights), weights, 2, method, uncentered=cosine).groups
    for i in range(4):
        assert groups[i] == groups[i + 4]
        assert groups[8 + i] == groups[12 + i] != groups[i]


# ---- pins
@pytest.mark.parametrize("method", ["pca-swap", "pca-median", "pddp", "kmeans", "random", "text-cluster", "anti"])
def test_pins_hold_in_every_method(method):
    pins = Pins(
        together=(("d00", "d07", "d09"), ("d09", "d11")),
        apart=(("d01", "d02", "d00"), ("d03", "d04")),
        group={"d05": 2, "d06": 2, "d07": 1},
    )
    for seed in range(3):
        found = split(*mixture(seed, 16), 4, method, pins=pins, seed=seed)
        group = dict(zip(NAMES, found.groups, strict=False))
        assert group["d00"] == group["d07"] == group["d09"] == group["d11"] == 1
        assert group["d05"] == group["d06"] == 2
        assert len({group["d00"], group["d01"], group["d02"]}) == 3 and group["d03"] != group["d04"]
        assert set(found.groups) == {0, 1, 2, 3}


def test_apart_is_kept_where_it_leaves_a_single_way():
    names = NAMES[:6]  # a 3-colouring of a prism with two corners pinned
    apart = tuple((names[a], names[b]) for a, b in ((0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5), (0, 3), (1, 4)))
    pins = Pins(apart=apart, group={"d00": 0, "d05": 0})
    for seed in range(6):
        groups = split(*mixture(seed, 6), 3, pins=pins).groups
        assert all(groups[names.index(a)] != groups[names.index(b)] for a, b in apart)
        assert groups[0] == groups[5] == 0


def test_random_groups_obey_what_the_split_obeys():
    weights = mixture(12, 20)[1]
    pins = Pins(together=(("d00", "d01"),), apart=(("d02", "d03"),), group={"d04": 3})
    draws = random_groups(weights, NAMES[:20], 4, 50, pins=pins, tolerance=0.05)
    assert (draws[:, 0] == draws[:, 1]).all() and (draws[:, 2] != draws[:, 3]).all() and (draws[:, 4] == 3).all()
    shares = np.stack([(draws == k) @ weights for k in range(4)])
    assert np.abs(shares - 0.25).max() <= 0.05 + 1e-9
    assert len({tuple(row) for row in draws.tolist()}) == 50
    again = random_groups(weights[::-1], NAMES[:20][::-1], 4, 50, pins=pins, tolerance=0.05)
    assert (again[:, ::-1] == draws).all()


@pytest.mark.parametrize(
    "pins,message",
    [
        (Pins(together=(("d00", "x"),)), "pins.together: must be a dataset of the mixture, got 'x'"),
        (Pins(group={"x": 0}), "pins.group: must be a dataset of the mixture, got 'x'"),
        (Pins(group={"d01": 2}), "pins.group.d01: must be 0 to 1, got 2"),
        (Pins(together=(("d00", "d01"),), apart=(("d01", "d00"),)), "pins: d00 and d01 must be together and apart"),
        (
            Pins(together=(("d00", "d01"), ("d01", "d02")), group={"d00": 0, "d02": 1}),
            "pins: d00 and d02 must be together, but are pinned to groups 0 and 1",
        ),
        (
            Pins(apart=(("d00", "d01"),), group={"d00": 1, "d01": 1}),
            "pins: d00 and d01 must be apart, but both are pinned to group 1",
        ),
        (Pins(apart=(("d00", "d01", "d02"),)), "pins.apart: d00, d01, d02 must be apart, which takes 3 groups, not 2"),
        (
            Pins(apart=(("d00", "d01"), ("d01", "d02"), ("d02", "d00"))),
            "pins: no way to keep d00, d01, d02 apart in 2 groups",
        ),
        (Pins(group={name: 0 for name in NAMES[:6]}), "groups: must be at most the number of datasets"),
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
    groups = split(*mixture(0, 6), 2, pins=pins).groups
    assert groups[0] == groups[1] and groups[2] != groups[3] and groups[4] == 1


def test_a_spread_dataset_cannot_be_pinned():
    with pytest.raises(InputError, match="pins.group: d00 cannot be pinned, its rows are spread over all groups"):
        split(*mixture(0, 6), 2, pins=Pins(group={"d00": 0}), spread=["d00"])


# ---- what a caller may give
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number,groups", [(1, 1), (2, 1), (2, 2), (3, 2), (4, 4), (5, 4), (9, 8)])
def test_every_method_fills_every_group_of_a_small_mixture(method, number, groups):
    similarity, weights = mixture(number, number)
    found = split(similarity, weights, groups, method)
    assert set(found.groups) == ({-1} if method == "iid" and groups > 1 else set(range(groups)))
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
            assert np.bincount(found.groups).tolist() == [2, 2, 2, 2]


def test_manual_groups_are_taken_as_they_are():
    similarity, weights = mixture(13, 5)
    manual = [["d04", "d01"], ["d00", "d02", "d03"]]
    found = partition(similarity, weights, NAMES[:5], 2, "manual", manual=manual)
    assert found.groups == (1, 0, 1, 1, 0) and "is not kept" in found.note


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
        partition(*mixture(0, 3), NAMES[:3], 2, "manual", manual=manual)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"groups": 5}, r"groups: must be at most the number of datasets \(4\), got 5"),
        ({"groups": 0}, "groups: must be at least 1, got 0"),
        ({"groups": 3, "method": "pca-median"}, "groups: must be a power of two with method pca-median, got 3"),
        ({"method": "magic"}, "method: must be one of pca-swap, .* got 'magic'"),
        ({"method": "text-cluster"}, "text-cluster: must be given the similarity of the datasets' texts"),
        ({"tolerance": -0.1}, "tolerance: must be 0 or more, got -0.1"),
        ({"tolerance": math.nan}, "tolerance: must be 0 or more, got nan"),
        ({"names": ["a", "b", "b", "c"]}, "names: must be distinct and at least one, got 'b'"),
        ({"weights": np.array([1.0, 2, 0, 1])}, "weights: must be one positive number per dataset"),
        ({"similarity": np.full((4, 4), np.nan)}, r"similarity: must be finite and \[4, 4\]"),
        ({"similarity": np.zeros((3, 3))}, r"similarity: must be finite and \[4, 4\], got \[3, 3\]"),
    ],
)
def test_what_cannot_be_split_is_refused(changes, message):
    similarity, weights = mixture(0, 4)
    call = {"similarity": similarity, "weights": weights, "names": NAMES[:4], "groups": 2, **changes}
    with pytest.raises(InputError, match=message):
        partition(**call)


# ---- the paper's axes and medians
def between(groups, gradients, hessian):
    """eta^2 / 2 times the between-group sum of squares of H^(1/2) H g: the gain of one step, up to a constant."""
    z = gradients @ np.linalg.cholesky(hessian)
    parts = [z[np.array(groups) == k] for k in set(groups)]
    return sum(len(p) / len(z) * np.sum((p.mean(0) - z.mean(0)) ** 2) for p in parts)


def test_worked_example_of_the_paper():
    """T=4 datasets at (+-1, +-1), H = diag(2, 1), step .1: gains .04, .005, 0; random mean .015; axis 1 is chosen."""
    hessian, step = np.diag([2.0, 1.0]), 0.1
    optima = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)], float)
    gradients = -optima @ hessian

    def gain(groups):
        return 0.5 * step**2 * between(groups, gradients, hessian)

    assert gain([1, 1, 0, 0]) == pytest.approx(0.04)
    assert gain([1, 0, 1, 0]) == pytest.approx(0.005)
    assert gain([1, 0, 0, 1]) == pytest.approx(0.0, abs=1e-15)
    halves = [[int(i in pair) for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    assert np.mean([gain(groups) for groups in halves]) == pytest.approx(0.015)
    axes = conflict_axes(cosine_matrix(gradients), 1)
    groups = median_partition(axes.scores, np.full(4, 0.25), NAMES[:4]).groups
    assert groups in ((1, 1, 0, 0), (0, 0, 1, 1))
    assert gain(groups) == pytest.approx(0.04)


def test_opposites_part_and_twins_stay():
    generator = np.random.default_rng(2)
    directions = generator.standard_normal((4, 30))
    rows = np.concatenate(
        [directions, directions + 1e-3 * generator.standard_normal((4, 30)), -directions, -directions]
    )
    axes = conflict_axes(cosine_matrix(rows), 2)
    groups = median_partition(axes.scores, np.full(16, 1 / 16), NAMES).groups
    for i in range(4):
        assert groups[i] == groups[i + 4]
        assert groups[8 + i] == groups[12 + i] != groups[i]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_groups_do_not_depend_on_order_scale_or_axis_sign(axes):
    generator = np.random.default_rng(3)
    rows, weights = generator.standard_normal((16, 40)), generator.uniform(0.5, 2, 16)

    def groups(order, scale):
        names = [NAMES[i] for i in order]
        scores = conflict_axes(cosine_matrix(rows[order] * scale[order, None]), axes).scores
        return dict(zip(names, median_partition(scores, weights[order], names).groups, strict=True))

    first = groups(np.arange(16), np.ones(16))
    assert first == groups(generator.permutation(16), generator.uniform(0.1, 9, 16))
    assert set(first.values()) == set(range(2**axes))


def test_median_lies_within_one_dataset_of_half_the_weight():
    generator = np.random.default_rng(7)
    for _ in range(50):
        weights = generator.uniform(0.1, 3, 11)
        groups = np.array(median_partition(generator.standard_normal((11, 1)), weights, NAMES[:11]).groups)
        assert abs(weights[groups == 0].sum() - weights.sum() / 2) <= weights.max() / 2 + 1e-12


def test_no_group_is_empty_even_under_one_heavy_dataset():
    weights = np.array([100.0, 1, 1, 1, 1, 1, 1, 1])
    scores = np.random.default_rng(0).standard_normal((8, 3))
    assert sorted(median_partition(scores, weights, NAMES[:8]).groups) == list(range(8))
    with pytest.raises(ValueError, match="8 groups need at least as many datasets, got 7"):
        median_partition(scores[:7], weights[:7], NAMES[:7])


def test_eta_squared_is_the_explicit_share():
    generator = np.random.default_rng(8)
    z, weights = generator.standard_normal((10, 6)), generator.uniform(0.5, 2, 10)
    weights /= weights.sum()
    groups = generator.integers(0, 3, 10)
    mean = weights @ z
    total = weights @ np.sum((z - mean) ** 2, axis=1)
    between_groups = 0.0
    for k in range(3):
        w = weights * (groups == k)
        between_groups += w.sum() * np.sum((w @ z / w.sum() - mean) ** 2)
    assert eta_squared(double_center(z @ z.T, weights), weights, groups) == pytest.approx(between_groups / total)
