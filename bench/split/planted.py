"""Mixtures with planted conflicts: gradients, noisy block sums, texts, and the best split."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merit_fast.split.conflict import cosine_matrix
from merit_fast.split.moments import BlockProducts, block_products
from merit_fast.split.search.objective import between_sum, double_center
from merit_fast.split.search.partition import partition_datasets

Array = npt.NDArray[np.float64]

DIMENSIONS = 1024
BLOCKS = 8
AXES = (1.0, 0.8, 0.6)  # strength of the planted conflicts; the datasets' own part has 1
NOISE = 80.0  # median of tr(Sigma) / |g|^2 per example


@dataclass(frozen=True)
class Mixture:
    """A mixture with its truth.

    Attributes:
        names, weights: [N] of the datasets.
        means: [N, D] mean gradients.
        noise: [N] tr(Sigma) / |g|^2 per example.
        truth: [N, N] true cosines, centred.
        sides: [N, 3] planted signs.
    """

    names: list[str]
    weights: Array
    means: Array
    noise: Array
    truth: Array
    sides: Array

    def gain(self, labels: Sequence[int]) -> float:
        return between_sum(self.truth, self.weights, labels)


def plant(generator: np.random.Generator, number: int, axes: Sequence[float] = AXES) -> Mixture:
    sides = generator.choice([-1.0, 1.0], (number, len(AXES)))
    basis = np.eye(DIMENSIONS)  # noise is the same in all directions
    shared = basis[0]
    conflict = basis[1 : len(AXES) + 1]
    private = basis[len(AXES) + 1 : len(AXES) + 1 + number]
    means = (
        0.5 * shared
        + (sides * np.array(axes) * generator.uniform(0.6, 1.4, sides.shape)) @ conflict
        + private
    )
    means *= np.exp(0.35 * generator.standard_normal((number, 1)))
    weights = np.exp(0.3 * generator.standard_normal(number))
    weights /= weights.sum()
    noise = NOISE * np.exp(0.4 * generator.standard_normal(number))
    names = [f"d{i:02}" for i in range(number)]
    return Mixture(
        names, weights, means, noise, double_center(cosine_matrix(means), weights), sides
    )


def observe(
    mixture: Mixture, generator: np.random.Generator, fewest: int, most: int
) -> BlockProducts:
    """Samples products of block sums of ``fewest`` to ``most`` examples per dataset.

    The numbers are log-uniform, the noise is Gaussian.
    """
    number = len(mixture.names)
    counts = np.exp(generator.uniform(np.log(fewest), np.log(most), number)).round().astype(int)
    blocks = counts[:, None] // BLOCKS + (np.arange(BLOCKS) < counts[:, None] % BLOCKS)
    sd = np.sqrt(mixture.noise * (mixture.means**2).sum(1) / DIMENSIONS)[:, None, None]
    noise = (
        generator.standard_normal((number, BLOCKS, DIMENSIONS)) * np.sqrt(blocks)[:, :, None] * sd
    )
    return block_products(mixture.means[:, None] * blocks[:, :, None] + noise, blocks)


def write_texts(
    mixture: Mixture, generator: np.random.Generator, number: int = 12
) -> dict[str, list[str]]:
    """Writes rows whose words tell a topic.

    For half of the datasets the topic is the planted conflict group, for the others any.
    """
    planted = (mixture.sides > 0) @ np.array([4, 2, 1])
    topics = np.where(
        generator.random(len(planted)) < 0.5, planted, generator.integers(0, 8, len(planted))
    )
    texts = {}
    for name, topic in zip(mixture.names, topics, strict=True):
        words = np.where(
            generator.random((number, 20)) < 0.4, 100 * (1 + topic), 0
        ) + generator.integers(0, 60, (number, 20))
        texts[name] = [" ".join(f"w{word}" for word in row) for row in words]
    return texts


def best_of_all(mixture: Mixture, groups: int) -> float:
    """Largest gain of all splits within the tolerance, or within the least possible imbalance."""
    weights = mixture.weights
    labels = np.zeros((1, 1), np.int8)
    for _ in range(len(weights) - 1):
        highest = labels.max(1)
        grown = [labels[highest >= k - 1] for k in range(groups)]
        labels = np.concatenate(
            [np.c_[rows, np.full(len(rows), k, np.int8)] for k, rows in enumerate(grown)]
        )
    labels = labels[labels.max(1) == groups - 1]
    gain = np.zeros(len(labels))
    off = np.zeros(len(labels))
    for group in range(groups):
        inside = (labels == group) * weights
        weight = inside.sum(1)
        gain += np.einsum("ln,ln->l", inside @ mixture.truth, inside) / weight
        off = np.maximum(off, np.abs(weight - 1 / groups))
    return float(gain[off <= max(0.05 / groups, off.min()) + 1e-9].max())


def best_known(mixture: Mixture, groups: int) -> float:
    splits = (
        partition_datasets(mixture.truth, mixture.weights, mixture.names, groups, seed=seed)
        for seed in range(3)
    )
    return max(partition.objective for partition in splits)
