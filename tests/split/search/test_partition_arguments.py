"""Partitions: independent of order, scale and signs; groups filled, or arguments refused."""

import math

import numpy as np
import pytest
from support.split.partitions import NAMES, mixture, split

from merit_fast.errors import InputError
from merit_fast.split.conflict import cosine_matrix
from merit_fast.split.search.methods import METHODS
from merit_fast.split.search.objective import double_center
from merit_fast.split.search.partition import partition_datasets


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
    partition = split(similarity, weights, groups, method)
    assert [partition.labels[i] for i in order] == list(other.labels)
    assert [partition.margins[i] for i in order] == pytest.approx(other.margins, abs=1e-12)


@pytest.mark.parametrize("method", ["pca-swap", "pca-median", "pddp"])
def test_the_sign_of_an_axis_never_matters(method, monkeypatch):
    similarity, weights = mixture(9, 16, dimensions=6)
    partition = split(similarity, weights, 4, method)
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
    assert split(similarity, weights, 4, method).labels == partition.labels


def test_scale_changes_nothing_and_seeds_change_random_groups():
    similarity, weights = mixture(10, 20)
    assert split(similarity * 1e6, weights, 4).labels == split(similarity, weights * 37, 4).labels
    first = split(similarity, weights, 4, "random", seed=0).labels
    assert first != split(similarity, weights, 4, "random", seed=1).labels
    assert first == split(similarity, weights, 4, "random", seed=0).labels


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


# ---- arguments
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number,groups", [(1, 1), (2, 1), (2, 2), (3, 2), (4, 4), (5, 4), (9, 8)])
def test_every_method_fills_every_group_of_a_small_mixture(method, number, groups):
    similarity, weights = mixture(number, number)
    partition = split(similarity, weights, groups, method)
    assert set(partition.labels) == ({-1} if method == "iid" and groups > 1 else set(range(groups)))
    assert np.isfinite(partition.margins).all() and sum(partition.group_weights) == pytest.approx(1)


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
        partition = split(similarity, weights, 4, method)
        assert np.isfinite([partition.objective, *partition.margins]).all()
        if method != "iid":
            assert np.bincount(partition.labels).tolist() == [2, 2, 2, 2]


def test_manual_groups_are_taken_as_they_are():
    similarity, weights = mixture(13, 5)
    manual = [["d04", "d01"], ["d00", "d02", "d03"]]
    partition = partition_datasets(similarity, weights, NAMES[:5], 2, "manual", manual=manual)
    assert partition.labels == (1, 0, 1, 1, 0) and "is not kept" in partition.note


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
