"""What theory says of splitting and merging, held against real descents, real merges and the package's own figures."""

import itertools

import numpy as np
import pytest
import torch

from merit_fast.merge import merge_state_dicts
from merit_fast.split.conflict import (
    between_sum,
    conflict_of,
    double_center,
    eta_squared,
    total_sum,
)
from merit_fast.split.moments import block_products
from merit_fast.split.search.medians import conflict_axes, median_partition
from merit_fast.split.search.partition import partition


def hessian(generator, size, decades=2.0):
    """A random positive definite matrix whose eigenvalues lie within so many decades below 1."""
    basis, _ = np.linalg.qr(generator.standard_normal((size, size)))
    return (basis * 10 ** -generator.uniform(0, decades, size)) @ basis.T


def descend(gradient, size, steps, rate, momentum=0.0):
    """Gradient descent with momentum from 0."""
    position, velocity = np.zeros(size), np.zeros(size)
    for _ in range(steps):
        velocity = momentum * velocity + gradient(position)
        position = position - rate * velocity
    return position


def merged(positions, weights):
    """The package's own merge."""
    states = [{"w": torch.from_numpy(position)} for position in positions]
    return merge_state_dicts(states, [float(w) for w in weights], normalize=False)["w"].numpy()


def shares(weights, groups):
    return np.array([weights[groups == k].sum() for k in range(groups.max() + 1)])


def group_means(rows, weights, groups):
    return np.array(
        [
            np.average(rows[groups == k], axis=0, weights=weights[groups == k])
            for k in range(groups.max() + 1)
        ]
    )


def balanced_halves(count):
    return [
        np.isin(np.arange(count), chosen).astype(int)
        for chosen in itertools.combinations(range(count), count // 2)
    ]


# ---- the gain
@pytest.mark.parametrize("size,branches,decades", [(4, 2, 0), (30, 5, 2), (120, 8, 4)])
def test_gain_is_half_the_spread_of_the_branches_in_the_hessians_metric(size, branches, decades):
    """Of any quadratic, with a linear term, at no stationary point: directly, by pairs, by eigenvectors."""
    generator = np.random.default_rng(size)
    curvature, slope = hessian(generator, size, decades), generator.standard_normal(size)
    points, weights = (
        generator.standard_normal((branches, size)),
        generator.dirichlet(np.ones(branches)),
    )

    def loss(x):
        return 0.5 * x @ curvature @ x + slope @ x + 3

    middle = weights @ points
    losses = np.array([loss(x) for x in points])
    gain, scale = weights @ losses - loss(middle), np.abs(losses).mean()
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
    """|mean delta|^2 = mean |delta|^2 - variance: a share of 1 if branches agree, 0 in conflict, 1/K if unrelated."""
    generator = np.random.default_rng(0)
    deltas, weights = generator.standard_normal((5, 40)), generator.dirichlet(np.ones(5))
    gram = deltas @ deltas.T
    left = weights @ np.diag(gram) - total_sum(double_center(gram, weights), weights)
    assert np.sum(merged(deltas, weights) ** 2) == pytest.approx(left, rel=1e-12)

    def shrink(rows):
        equal = np.full(len(rows), 1 / len(rows))
        return np.sum(merged(rows, equal) ** 2) / np.mean(np.sum(rows**2, axis=1))

    one = generator.standard_normal((1, 20000))
    assert shrink(np.tile(one, (4, 1))) == pytest.approx(1)
    assert shrink(np.concatenate([one, -one, one, -one])) == pytest.approx(0, abs=1e-15)
    assert shrink(generator.standard_normal((4, 20000))) == pytest.approx(1 / 4, rel=0.05)


# ---- merge against joint training
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_a_shared_hessian_every_split_merges_into_the_joint_run(momentum):
    generator = np.random.default_rng(1)
    curvature, gradients = hessian(generator, 20), generator.standard_normal((12, 20))
    weights = generator.dirichlet(np.ones(12))

    def run(gradient):
        return descend(lambda x: gradient + curvature @ x, 20, 30, 0.3, momentum)

    joint = run(weights @ gradients)
    for _ in range(5):
        groups = generator.permutation(np.arange(12) % 4)
        branches = [run(mean) for mean in group_means(gradients, weights, groups)]
        assert np.abs(merged(branches, shares(weights, groups)) - joint).max() < 1e-10


def test_a_split_acts_through_the_covariance_of_hessians_and_gradients():
    """merge - joint = eta^2 S (S - 1) / 2 Cov(H_k, g_k) + O(eta^3): the relative error halves with eta."""
    generator = np.random.default_rng(2)
    weights, steps = np.array([0.5, 0.3, 0.2]), 12
    curvatures = np.stack([hessian(generator, 15) for _ in weights])
    gradients = generator.standard_normal((3, 15))
    curvature, gradient = np.tensordot(weights, curvatures, 1), weights @ gradients
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
            np.linalg.norm(merged(branches, weights) - joint - predicted)
            / np.linalg.norm(predicted)
        )
    ratios = np.array(errors[:-1]) / errors[1:]
    assert ratios[-1] == pytest.approx(2, abs=0.1) and errors[-1] < 0.02


# ---- the gain of a split
def test_gain_of_a_split_is_half_its_between_group_sum_of_squares():
    """z = H^1/2 f(H) g with f(l) = (1 - (1 - eta l)^S) / l, after S steps; from the Gram alone, and from block sums."""
    generator = np.random.default_rng(3)
    curvature, gradients = hessian(generator, 12), generator.standard_normal((10, 12))
    weights, rate, steps = generator.dirichlet(np.full(10, 5.0)), 0.2, 25
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
        gain = share @ [loss(x) for x in branches] - loss(merged(branches, share))
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
    """Optima (+-1, +-1), H = diag(2, 1), one step of .1: gains .04, .005, 0; random .015; the paper cuts axis 1."""
    curvature, optima = np.diag([2.0, 1.0]), np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)], float)
    gradients, equal = -optima @ curvature, np.full(4, 0.25)

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
    groups = median_partition(conflict_axes(cosine, 1).scores, equal, "abcd").groups
    assert gain(groups) == pytest.approx(0.04)


@pytest.mark.parametrize("count", [4, 6, 8])
def test_expected_gain_of_a_random_balanced_bipartition(count):
    """tr(M) / (2 N (N - 1)) for one step of 1, M the centred Gram in the Hessian's metric."""
    generator = np.random.default_rng(count)
    gradients, equal = generator.standard_normal((count, 6)), np.full(count, 1 / count)
    centered = double_center(gradients @ hessian(generator, 6) @ gradients.T, equal)
    gains = [0.5 * between_sum(centered, equal, groups) for groups in balanced_halves(count)]
    assert np.mean(gains) == pytest.approx(
        np.trace(centered) / (2 * count * (count - 1)), rel=1e-12
    )


# ---- what enters the split
def noisy_blocks(means, generator, blocks=8, per_block=16, noise=2.0):
    draws = generator.standard_normal((len(means), blocks, means.shape[1])) / np.sqrt(
        means.shape[1]
    )
    return per_block * means[:, None] + np.sqrt(per_block * noise) * draws, np.full(
        (len(means), blocks), per_block
    )


def split_of(sums, counts, names, method="pca-swap", groups=2):
    weights = np.full(len(names), 1 / len(names))
    similarity = conflict_of(block_products(sums, counts), debias="blocks").similarity
    centered = double_center(similarity, weights)
    found = partition(centered, weights, names, groups, method, uncentered=similarity)
    return np.array(found.groups)


@pytest.mark.parametrize("debias", ["blocks", "none"])
def test_cosines_do_not_see_the_scale_of_a_dataset(debias):
    generator = np.random.default_rng(4)
    sums, counts = noisy_blocks(generator.standard_normal((10, 300)), generator)
    powers = np.ldexp(1.0, generator.integers(-30, 30, 10))[:, None, None]
    scales = generator.uniform(1e-3, 1e3, 10)[:, None, None]
    plain, doubled, scaled = (
        conflict_of(block_products(factor * sums, counts), debias=debias)
        for factor in (1.0, powers, scales)
    )
    assert np.array_equal(doubled.cosine, plain.cosine) and np.array_equal(
        doubled.error, plain.error
    )
    assert np.abs(scaled.cosine - plain.cosine).max() < 1e-6
    assert scaled.signal_fraction == pytest.approx(plain.signal_fraction, rel=1e-6)


@pytest.mark.parametrize("method", ["pca-swap", "pca-median"])
def test_twins_land_together_and_opposites_apart(method):
    generator = np.random.default_rng(5)
    axis = generator.standard_normal(300)
    first = axis + 0.3 * generator.standard_normal((4, 300))
    sums, counts = noisy_blocks(np.concatenate([first, first, -first, -first]), generator)
    groups = split_of(sums, counts, [f"d{i:02}" for i in range(16)], method)
    assert set(groups[:8]) != set(groups[8:]) and len(set(groups[:8])) == len(set(groups[8:])) == 1


def test_debiased_squares_are_unbiased_and_naive_ones_high_by_the_noise_of_a_mean():
    generator = np.random.default_rng(6)
    means, examples, covariance = 0.3 * generator.standard_normal((3, 50)), 40, 1.7
    squares = {"blocks": [], "none": []}
    for _ in range(600):
        draws = means + np.sqrt(covariance) * generator.standard_normal((examples, 3, 50))
        sums = np.stack([draws[block::8].sum(0) for block in range(8)], axis=1)
        products = block_products(sums, np.full((3, 8), examples // 8))
        for debias, found in squares.items():
            found.append(conflict_of(products, debias=debias).gram)
    truth = means @ means.T
    off = ~np.eye(3, dtype=bool)
    naive, debiased = np.mean(squares["none"], axis=0), np.mean(squares["blocks"], axis=0)
    assert np.diag(debiased) == pytest.approx(np.diag(truth), rel=0.03)
    assert np.diag(naive) - np.diag(truth) == pytest.approx(
        np.full(3, 50 * covariance / examples), rel=0.05
    )
    assert np.array_equal(naive[off], debiased[off])
    assert np.abs((debiased - truth)[off]).max() < 0.05 * np.diag(truth).max()


# ---- a tiny net, end to end
class Tiny:
    """A net of 240 parameters, trained on the mean of 8 tasks that pull it apart along two axes."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shared, axes = draw(6, 4), draw(2, 6, 4)
        pull = torch.tensor(
            [(a, b) for a in (-1.0, 1.0) for b in (-0.6, -0.2, 0.2, 0.6)], dtype=torch.float64
        )
        self.inputs = draw(8, 64, 6)
        apart = torch.einsum("ta,tnd,ado->tno", pull, torch.tanh(self.inputs), axes)
        self.targets = torch.tanh(self.inputs @ shared) + 0.7 * apart
        self.start = torch.cat([0.5 * draw(6 * 24), 0.3 * draw(24 * 4)])
        self.start = self.train([np.zeros(8, int)], steps=150)[0, 0]

    def losses(self, weights):
        """[M, 8, 64] of every example, for M models [M, 240]."""
        first, second = (
            weights[:, : 6 * 24].view(-1, 1, 6, 24),
            weights[:, 6 * 24 :].view(-1, 1, 24, 4),
        )
        return ((torch.tanh(self.inputs @ first) @ second - self.targets) ** 2).mean(-1)

    def train(self, splits, steps, rate=0.05):
        """[S, K, 240] branches of S splits, each on its own tasks, all in step."""
        groups = torch.tensor(np.array(splits))
        inside = (
            (groups[:, None] == torch.arange(int(groups.max()) + 1)[:, None]).double().flatten(0, 1)
        )
        weights = self.start.repeat(len(inside), 1)
        for _ in range(steps):
            weights.requires_grad_()
            loss = (self.losses(weights).mean(2) * inside).sum(1) / inside.sum(1)
            weights = (weights - rate * torch.autograd.grad(loss.sum(), weights)[0]).detach()
        return weights.view(len(groups), -1, weights.shape[1])

    def blocks(self):
        """Block sums [8, 8, 240] of per-example gradients at the start."""
        copies = self.start.repeat(8 * 64, 1).requires_grad_()
        own = self.losses(copies).view(8 * 64, 8 * 64).diagonal().sum()
        gradients = torch.autograd.grad(own, copies)[0].view(8, 8, 8, -1)  # task, turn, block
        return gradients.sum(1).numpy()

    def gains(self, splits):
        """Measured gain of each split in two, its branches less their merge, the merges."""
        branches = self.train(splits, steps=20)
        middles = torch.stack(
            [torch.from_numpy(merged(pair.numpy(), [0.5, 0.5])) for pair in branches]
        )
        loss = self.losses(branches.flatten(0, 1)).mean((1, 2)).view(-1, 2).mean(1)
        return (
            (loss - self.losses(middles).mean((1, 2))).numpy(),
            branches - middles[:, None],
            middles,
        )

    def audit(self, deltas, middle):
        """Half the branches' spread in the Hessian at the merge."""
        total = 0.0
        for delta in deltas:
            _, bent = torch.autograd.functional.hvp(
                lambda w: self.losses(w[None]).mean(), middle, delta
            )
            total += float(delta @ bent) / 4
        return total


@pytest.mark.parametrize("seed", range(3))
def test_tiny_net_gains_most_by_the_found_split_and_least_by_its_opposite(seed):
    net = Tiny(seed)
    sums, counts, names = net.blocks(), np.full((8, 8), 8), list("abcdefgh")
    found, least = (split_of(sums, counts, names, method) for method in ("pca-swap", "anti"))
    halves = [groups for groups in balanced_halves(8) if groups[0]]  # all there are
    gains, deltas, middles = net.gains([found, least, *halves])
    assert gains[0] > gains[2:].mean() > gains[1]
    assert gains[0] == pytest.approx(gains[2:].max(), rel=0.1)
    assert gains[0] / net.audit(deltas[0], middles[0]) == pytest.approx(1, abs=0.1)
