"""Theory of splitting and merging against real descents, real merges and our figures."""

import numpy as np
import pytest
from support.split.block_sums import eta_squared
from support.split.partitions import balanced_halves, merge_vectors

from merit_fast.split.conflict import (
    between_sum,
    conflict_of,
    double_center,
    total_sum,
)
from merit_fast.split.moments import block_products
from merit_fast.split.search.medians import conflict_axes, median_partition


def hessian(generator, size, decades=2.0):
    """A random positive definite matrix whose eigenvalues lie within so many decades below 1."""
    basis, _ = np.linalg.qr(generator.standard_normal((size, size)))
    return (basis * 10 ** -generator.uniform(0, decades, size)) @ basis.T


def descend(gradient, size, steps, rate, momentum=0.0):
    """Gradient descent with momentum from 0."""
    position = np.zeros(size)
    velocity = np.zeros(size)
    for _ in range(steps):
        velocity = momentum * velocity + gradient(position)
        position = position - rate * velocity
    return position


def shares(weights, groups):
    return np.array([weights[groups == k].sum() for k in range(groups.max() + 1)])


def group_means(rows, weights, groups):
    return np.array(
        [
            np.average(rows[groups == k], axis=0, weights=weights[groups == k])
            for k in range(groups.max() + 1)
        ]
    )


# ---- the gain
@pytest.mark.parametrize("size,branches,decades", [(4, 2, 0), (30, 5, 2), (120, 8, 4)])
def test_gain_is_half_the_spread_of_the_branches_in_the_hessians_metric(size, branches, decades):
    """Checks any quadratic with a linear term, at no stationary point.

    The gain is computed directly, by pairs and by eigenvectors.
    """
    generator = np.random.default_rng(size)
    curvature = hessian(generator, size, decades)
    slope = generator.standard_normal(size)
    points = generator.standard_normal((branches, size))
    weights = generator.dirichlet(np.ones(branches))

    def loss(x):
        return 0.5 * x @ curvature @ x + slope @ x + 3

    middle = weights @ points
    losses = np.array([loss(x) for x in points])
    gain = weights @ losses - loss(middle)
    scale = np.abs(losses).mean()
    centered = double_center(points @ curvature @ points.T, weights)
    values, vectors = np.linalg.eigh(curvature)
    along = points @ vectors
    forms = {
        "direct": 0.5
        * sum(
            w * (x - middle) @ curvature @ (x - middle)
            for w, x in zip(weights, points, strict=True)
        ),
        "from the Gram": 0.5 * total_sum(centered, weights),
        "every branch its own group": 0.5 * between_sum(centered, weights, range(branches)),
        "pairs": 0.25
        * sum(
            weights[i] * weights[j] * (points[i] - points[j]) @ curvature @ (points[i] - points[j])
            for i in range(branches)
            for j in range(branches)
        ),
        "spectral": 0.5 * values @ (weights @ (along - weights @ along) ** 2),
    }
    assert gain > 0
    for name, form in forms.items():
        assert abs(form - gain) <= 1e-12 * scale, name


def test_merging_contracts_by_the_variance_of_the_branches():
    """Checks |mean delta|^2 = mean |delta|^2 - variance.

    The share is 1 if branches agree, 0 in conflict, 1/K if unrelated.
    """
    generator = np.random.default_rng(0)
    deltas = generator.standard_normal((5, 40))
    weights = generator.dirichlet(np.ones(5))
    gram = deltas @ deltas.T
    left = weights @ np.diag(gram) - total_sum(double_center(gram, weights), weights)
    assert np.sum(merge_vectors(deltas, weights) ** 2) == pytest.approx(left, rel=1e-12)

    def shrink(rows):
        equal = np.full(len(rows), 1 / len(rows))
        return np.sum(merge_vectors(rows, equal) ** 2) / np.mean(np.sum(rows**2, axis=1))

    delta = generator.standard_normal((1, 20000))
    assert shrink(np.tile(delta, (4, 1))) == pytest.approx(1)
    assert shrink(np.concatenate([delta, -delta, delta, -delta])) == pytest.approx(0, abs=1e-15)
    assert shrink(generator.standard_normal((4, 20000))) == pytest.approx(1 / 4, rel=0.05)


# ---- merge against joint training
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_a_shared_hessian_every_split_merges_into_the_joint_run(momentum):
    generator = np.random.default_rng(1)
    curvature = hessian(generator, 20)
    gradients = generator.standard_normal((12, 20))
    weights = generator.dirichlet(np.ones(12))

    def run(gradient):
        return descend(lambda x: gradient + curvature @ x, 20, 30, 0.3, momentum)

    joint = run(weights @ gradients)
    for _ in range(5):
        groups = generator.permutation(np.arange(12) % 4)
        branches = [run(mean) for mean in group_means(gradients, weights, groups)]
        assert np.abs(merge_vectors(branches, shares(weights, groups)) - joint).max() < 1e-10


def test_a_split_acts_through_the_covariance_of_hessians_and_gradients():
    """Checks merge - joint = eta^2 S (S - 1) / 2 Cov(H_k, g_k) + O(eta^3).

    The relative error halves with eta.
    """
    generator = np.random.default_rng(2)
    weights = np.array([0.5, 0.3, 0.2])
    steps = 12
    curvatures = np.stack([hessian(generator, 15) for _ in weights])
    gradients = generator.standard_normal((3, 15))
    curvature = np.tensordot(weights, curvatures, 1)
    gradient = weights @ gradients
    covariance = np.einsum("k,kij,kj->i", weights, curvatures, gradients) - curvature @ gradient
    errors = []
    for rate in 0.02 / 2.0 ** np.arange(5):
        branches = [
            descend(lambda x, h=h, g=g: g + h @ x, 15, steps, rate)
            for h, g in zip(curvatures, gradients, strict=True)
        ]
        joint = descend(lambda x: gradient + curvature @ x, 15, steps, rate)
        predicted = rate**2 * steps * (steps - 1) / 2 * covariance
        errors.append(
            np.linalg.norm(merge_vectors(branches, weights) - joint - predicted)
            / np.linalg.norm(predicted)
        )
    ratios = np.array(errors[:-1]) / errors[1:]
    assert ratios[-1] == pytest.approx(2, abs=0.1) and errors[-1] < 0.02


# ---- the gain of a split
def test_gain_of_a_split_is_half_its_between_group_sum_of_squares():
    """Checks z = H^1/2 f(H) g with f(l) = (1 - (1 - eta l)^S) / l after S steps.

    From the Gram only, and from block sums.
    """
    generator = np.random.default_rng(3)
    curvature = hessian(generator, 12)
    gradients = generator.standard_normal((10, 12))
    weights = generator.dirichlet(np.full(10, 5.0))
    rate = 0.2
    steps = 25
    values, vectors = np.linalg.eigh(curvature)
    moved = (1 - (1 - rate * values) ** steps) / values
    rows = gradients @ (vectors * moved * np.sqrt(values)) @ vectors.T
    centered = double_center(rows @ rows.T, weights)
    blocks = np.repeat(rows[:, None], 4, axis=1) * 25
    measured = conflict_of(
        block_products(blocks, np.full((10, 4), 25)), similarity="gram", debias="blocks"
    )

    def loss(x):
        return 0.5 * x @ curvature @ x + weights @ gradients @ x

    for _ in range(5):
        groups = generator.permutation(np.arange(10) % 3)
        share = shares(weights, groups)
        branches = [
            descend(lambda x, g=g: g + curvature @ x, 12, steps, rate)
            for g in group_means(gradients, weights, groups)
        ]
        gain = share @ [loss(x) for x in branches] - loss(merge_vectors(branches, share))
        between = between_sum(centered, weights, groups)
        assert 0.5 * between == pytest.approx(gain, rel=1e-10)
        from_blocks = between_sum(double_center(measured.similarity, weights), weights, groups)
        assert 0.5 * from_blocks == pytest.approx(gain, rel=1e-6)
        middles = group_means(rows, weights, groups)[groups]
        within = weights @ np.sum((rows - middles) ** 2, axis=1)
        assert between + within == pytest.approx(total_sum(centered, weights), rel=1e-12)
        assert eta_squared(centered, weights, groups) == pytest.approx(
            between / (between + within), rel=1e-12
        )


def test_the_papers_example_of_four_datasets():
    """Checks the paper's figures.

    Optima (+-1, +-1), H = diag(2, 1), one step of .1: gains .04, .005, 0; random .015; the paper
    cuts axis 1.
    """
    curvature = np.diag([2.0, 1.0])
    optima = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)], float)
    gradients = -optima @ curvature
    equal = np.full(4, 0.25)

    def gain(groups):
        groups = np.asarray(groups)
        steps = -0.1 * group_means(gradients, equal, groups)
        return (
            np.mean([0.5 * x @ curvature @ x for x in steps]) - 0.0
        )  # the mean gradient and the merge are 0

    assert [gain(g) for g in ([1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1])] == pytest.approx(
        [0.04, 0.005, 0]
    )
    assert np.mean([gain(g) for g in balanced_halves(4)]) == pytest.approx(0.015)
    sums = np.repeat(gradients[:, None], 2, axis=1)
    cosine = conflict_of(block_products(sums, np.ones((4, 2))), debias="none").similarity
    groups = median_partition(conflict_axes(cosine, 1).scores, equal, "abcd").labels
    assert gain(groups) == pytest.approx(0.04)


@pytest.mark.parametrize("count", [4, 6, 8])
def test_expected_gain_of_a_random_balanced_bipartition(count):
    """Checks tr(M) / (2 N (N - 1)) for one step of 1, M the centred Gram under the Hessian."""
    generator = np.random.default_rng(count)
    gradients = generator.standard_normal((count, 6))
    equal = np.full(count, 1 / count)
    centered = double_center(gradients @ hessian(generator, 6) @ gradients.T, equal)
    gains = [0.5 * between_sum(centered, equal, groups) for groups in balanced_halves(count)]
    assert np.mean(gains) == pytest.approx(
        np.trace(centered) / (2 * count * (count - 1)), rel=1e-12
    )
