"""Principal axes of a similarity matrix and weighted cuts (MERIT, section 4). Pure NumPy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Axes:
    """The first R principal axes: scores [N, R], explained variance shares [R]."""

    scores: Array
    explained_variance: Array


@dataclass(frozen=True)
class MedianCuts:
    """labels: [N] 0..K-1. cuts: (axis, score) of every cut, in order."""

    labels: tuple[int, ...]
    cuts: tuple[tuple[int, float], ...]


def conflict_axes(cosine: Array, count: int) -> Axes:
    """Computes the column-centred PCA of the rows of a cosine matrix [N, N], as published.

        x = cosine - cosine.mean(0); u, s, vt = svd(x); scores = x @ vt[:count].T

    Each axis is turned so that its loading of largest magnitude is positive (the first one on a
    tie). With fewer than ``count`` directions of variance the missing scores are zero.
    """
    centered = cosine - cosine.mean(0)
    _, singular, axes = np.linalg.svd(centered, full_matrices=False)
    axes = _largest_positive(axes[:count])
    variance = singular**2
    shares = variance / variance.sum() if variance.sum() > 0 else np.zeros_like(variance)
    scores = np.zeros((len(cosine), count))
    scores[:, : len(axes)] = centered @ axes.T
    return Axes(scores, _padded(shares, count))


def weighted_axes(products: Array, weights: Array, count: int) -> Axes:
    """Computes the weighted kernel PCA of vectors z given by their inner products.

        root = sqrt(weights)
        values, vectors = eigh(products / outer(root, root)); scores = vectors * sqrt(values) /
        root[:, None]

    Args:
        products: [N, N] weights_i weights_j <z_i, z_j>, z centred. May be indefinite: a direction
            of negative variance has score zero.
        weights: [N] positive.
        count: R.
    """
    root = np.sqrt(weights)
    values, vectors = np.linalg.eigh(products / np.outer(root, root))
    order = np.argsort(-values, kind="stable")[:count]
    variance = np.maximum(values, 0.0)
    # A direction of rounding errors would decide by noise; the names shall decide.
    variance[variance < 1e-12 * max(float(np.abs(values).max(initial=0.0)), 1e-300)] = 0.0
    scores = np.zeros((len(weights), count))
    scores[:, : len(order)] = (
        _largest_positive(vectors[:, order].T).T * np.sqrt(variance[order]) / root[:, None]
    )
    total = variance.sum()
    return Axes(scores, _padded(variance[order] / total if total > 0 else variance[order], count))


def _padded(shares: Array, count: int) -> Array:
    """[count] shares: 0 for the axes beyond those that so few datasets have."""
    return np.pad(shares[:count], (0, count - len(shares[:count])))


def median_partition(scores: Array, weights: Array, names: Sequence[str]) -> MedianCuts:
    """Makes K = 2^R groups: axis 0 cuts all datasets in half by weight, axis 1 each half, etc.

    Args:
        scores: [N, R].
        weights: [N] what the halves balance, positive.
        names: [N] dataset names; they break ties, so that the order of the mixture does not matter.

    Returns:
        Labels whose bits are the sides taken (0 low, 1 high; first axis highest bit). No group is
        empty.

    Raises:
        ValueError: fewer datasets than groups.
    """
    return cut_recursively(
        lambda side, depth: scores[side, depth], weights, names, 2 ** scores.shape[1]
    )


def cut_recursively(
    score: Callable[[Labels, int], Array], weights: Array, names: Sequence[str], num_groups: int
) -> MedianCuts:
    """Cuts datasets into any number of groups.

    A side of k groups is cut into floor(k / 2) / k of its weight and the rest.

    Args:
        score: scores of the datasets of a side, at a depth; larger ones go to the higher side.
        weights: [N] positive.
        names: [N], to break ties.
        num_groups: K, at most N.
    """
    if len(weights) < num_groups:
        raise ValueError(
            f"median_partition: {num_groups} groups need at least as many datasets, got "
            f"{len(weights)}"
        )
    cuts: list[tuple[int, float]] = []
    sides = [(np.arange(len(weights)), num_groups)]
    depth = 0
    while any(count > 1 for _, count in sides):
        halves = []
        for side, count in sides:
            if count == 1:
                halves.append((side, 1))
                continue
            values = score(side, depth)
            low, high = _cut(values, weights, names, side, count // 2, count)
            cuts.append((depth, float(values[low[-1]] + values[high[0]]) / 2))
            halves += [(side[low], count // 2), (side[high], count - count // 2)]
        sides = halves
        depth += 1
    labels = np.empty(len(weights), int)
    for label, (side, _) in enumerate(sides):
        labels[side] = label
    return MedianCuts(tuple(int(label) for label in labels), tuple(cuts))


def _largest_positive(axes: Array) -> Array:
    """Rows turned so that their entry of largest magnitude is positive.

    Entries within rounding of the largest count as tied; the first of them decides.
    """
    if axes.size == 0:
        return axes
    size = np.abs(axes)
    largest = (size >= size.max(1, keepdims=True) * (1 - 1e-9)).argmax(1)
    return np.asarray(axes * np.where(axes[np.arange(len(axes)), largest] < 0, -1.0, 1.0)[:, None])


def _cut(
    score: Array, weights: Array, names: Sequence[str], side: Labels, below: int, count: int
) -> tuple[Labels, Labels]:
    """Positions in ``side`` of its lower and its higher half.

    The lower half weighs as near to below / count as possible, less on a tie. Each half keeps at
    least as many datasets as it must become groups.
    """
    ordered = np.array(sorted(range(len(side)), key=lambda i: (score[i], names[int(side[i])])))
    weight = np.cumsum(weights[side[ordered]])
    sizes = np.arange(below, len(side) - (count - below) + 1)  # datasets in the lower half
    imbalance = np.abs(weight[sizes - 1] - weight[-1] * below / count)
    size = sizes[int(np.argmin(imbalance))]
    return ordered[:size], ordered[size:]
