"""The paper's axes and medians: its worked example, order, scale and signs."""

import itertools

import numpy as np
import pytest
from support.split.block_sums import eta_squared
from support.split.partitions import NAMES

from merit_fast.split.conflict import cosine_matrix
from merit_fast.split.search.medians import conflict_axes, median_partition
from merit_fast.split.search.objective import double_center


def between(groups, gradients, hessian):
    """Gain of one step up to a constant: the between-group sum of squares of H^(1/2) H g."""
    z = gradients @ np.linalg.cholesky(hessian)
    parts = [z[np.array(groups) == k] for k in set(groups)]
    return sum(len(p) / len(z) * np.sum((p.mean(0) - z.mean(0)) ** 2) for p in parts)


def test_worked_example_of_the_paper():
    """Checks the paper's figures.

    T=4 datasets at (+-1, +-1), H = diag(2, 1), step .1: gains .04, .005, 0; random mean .015. The
    paper chooses axis 1.
    """
    hessian = np.diag([2.0, 1.0])
    step = 0.1
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
    groups = median_partition(axes.scores, np.full(4, 0.25), NAMES[:4]).labels
    assert groups in ((1, 1, 0, 0), (0, 0, 1, 1))
    assert gain(groups) == pytest.approx(0.04)


def test_opposites_part_and_twins_stay():
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
    axes = conflict_axes(cosine_matrix(rows), 2)
    groups = median_partition(axes.scores, np.full(16, 1 / 16), NAMES).labels
    for i in range(4):
        assert groups[i] == groups[i + 4]
        assert groups[8 + i] == groups[12 + i] != groups[i]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_groups_do_not_depend_on_order_scale_or_axis_sign(axes):
    generator = np.random.default_rng(3)
    rows = generator.standard_normal((16, 40))
    weights = generator.uniform(0.5, 2, 16)

    def groups(order, scale):
        names = [NAMES[i] for i in order]
        scores = conflict_axes(cosine_matrix(rows[order] * scale[order, None]), axes).scores
        return dict(zip(names, median_partition(scores, weights[order], names).labels, strict=True))

    first = groups(np.arange(16), np.ones(16))
    assert first == groups(generator.permutation(16), generator.uniform(0.1, 9, 16))
    assert set(first.values()) == set(range(2**axes))


def test_median_lies_within_one_dataset_of_half_the_weight():
    generator = np.random.default_rng(7)
    for _ in range(50):
        weights = generator.uniform(0.1, 3, 11)
        groups = np.array(
            median_partition(generator.standard_normal((11, 1)), weights, NAMES[:11]).labels
        )
        assert abs(weights[groups == 0].sum() - weights.sum() / 2) <= weights.max() / 2 + 1e-12


def test_no_group_is_empty_even_under_one_heavy_dataset():
    weights = np.array([100.0, 1, 1, 1, 1, 1, 1, 1])
    scores = np.random.default_rng(0).standard_normal((8, 3))
    assert sorted(median_partition(scores, weights, NAMES[:8]).labels) == list(range(8))
    with pytest.raises(ValueError, match="8 groups need at least as many datasets, got 7"):
        median_partition(scores[:7], weights[:7], NAMES[:7])


def test_eta_squared_is_the_explicit_share():
    generator = np.random.default_rng(8)
    z = generator.standard_normal((10, 6))
    weights = generator.uniform(0.5, 2, 10)
    weights /= weights.sum()
    groups = generator.integers(0, 3, 10)
    mean = weights @ z
    total = weights @ np.sum((z - mean) ** 2, axis=1)
    between_groups = 0.0
    for k in range(3):
        w = weights * (groups == k)
        between_groups += w.sum() * np.sum((w @ z / w.sum() - mean) ** 2)
    assert eta_squared(double_center(z @ z.T, weights), weights, groups) == pytest.approx(
        between_groups / total
    )
