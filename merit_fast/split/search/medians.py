"""From a similarity matrix to axes, and from axes to groups by weighted cuts (MERIT, section 4). Pure NumPy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Axes:
    """The top R principal axes: scores [N, R], explained variance shares [R]."""

    scores: Array
    explained_variance: Array


@dataclass(frozen=True)
class MedianCuts:
    """groups: [N] labels 0..K-1. cuts: (axis, score) of every cut, in order."""

    groups: tuple[int, ...]
    cuts: tuple[tuple[int, float], ...]


def conflict_axes(cosine: Array, count: int) -> Axes:
    """Column-centred PCA of the rows of a cosine matrix [N, N], as published.

        x = cosine - cosine.mean(0); u, s, vt = svd(x); scores = x @ vt[:count].T

    Each axis is turned so that its loading of largest magnitude is positive (the first one on a tie). With fewer than
    ``count`` directions of variance the missing scores are zero.
    """
    centered = cosine - cosine.mean(0)
    _, singular, axes = np.linalg.svd(centered, full_matrices=False)
    axes = _turn(axes[:count])
    variance = singular**2
    shares = variance / variance.sum() if variance.sum() > 0 else np.zeros_like(variance)
    scores = np.zeros((len(cosine), count))
    scores[:, : len(axes)] = centered @ axes.T
    return Axes(scores, _padded(shares, count))


def weighted_axes(products: Array, weights: Array, count: int) -> Axes:
    """Weighted kernel PCA: the principal axes of vectors z known by their inner products alone.

        root = sqrt(weights)
        values, vectors = eigh(products / outer(root, root)); scores = vectors * sqrt(values) / root[:, None]

    Args:
        products: [N, N] weights_i weights_j <z_i, z_j>, z centred. May be indefinite: a direction of negative variance
            has score zero.
        weights: [N] positive.
        count: R.
    """
    root = np.sqrt(weights)
    values, vectors = np.linalg.eigh(products / np.outer(root, root))
    order = np.argsort(-values, kind="stable")[:count]
    variance = np.maximum(values, 0.0)
    # A direction of rounding errors alone would decide by noise what the names should.
    variance[variance < 1e-12 * max(float(np.abs(values).max(initial=0.0)), 1e-300)] = 0.0
    scores = np.zeros((len(weights), count))
    scores[:, : len(order)] = (
        _turn(vectors[:, order].T).T * np.sqrt(variance[order]) / root[:, None]
    )
    total = variance.sum()
    return Axes(scores, _padded(variance[order] / total if total > 0 else variance[order], count))


def _padded(shares: Array, count: int) -> Array:
    """[count]: axes that fewer datasets than ``count`` do not have explain nothing."""
    return np.pad(shares[:count], (0, count - len(shares[:count])))


def median_partition(scores: Array, weights: Array, names: Sequence[str]) -> MedianCuts:
    """K = 2^R groups: axis 0 cuts all datasets in half by weight, axis 1 cuts each half, and so on.

    Args:
        scores: [N, R].
        weights: [N] what the halves balance, positive.
        names: [N] dataset names; they break ties, so that the order of the mixture does not matter.

    Returns:
        Labels whose bits are the sides taken (0 low, 1 high; first axis highest bit). No group is empty.

    Raises:
        ValueError: fewer datasets than groups.
    """
    return cut_recursively(
        lambda part, depth: scores[part, depth], weights, names, 2 ** scores.shape[1]
    )


def cut_recursively(
    score: Callable[[Labels, int], Array], weights: Array, names: Sequence[str], groups: int
) -> MedianCuts:
    """Any K: a part for k groups is cut into floor(k / 2) / k and the rest of its weight.

    Args:
        score: of the datasets of a part, at a depth; larger ones go to the higher side.
        weights: [N] positive.
        names: [N], to break ties.
        groups: K, at most N.
    """
    if len(weights) < groups:
        raise ValueError(
            f"median_partition: {groups} groups need at least as many datasets, got {len(weights)}"
        )
    cuts: list[tuple[int, float]] = []
    parts = [(np.arange(len(weights)), groups)]
    depth = 0
    while any(count > 1 for _, count in parts):
        halves = []
        for part, count in parts:
            if count == 1:
                halves.append((part, 1))
                continue
            values = score(part, depth)
            low, high = _cut(values, weights, names, part, count // 2, count)
            cuts.append((depth, float(values[low[-1]] + values[high[0]]) / 2))
            halves += [(part[low], count // 2), (part[high], count - count // 2)]
        parts, depth = halves, depth + 1
    labels = np.empty(len(weights), int)
    for label, (part, _) in enumerate(parts):
        labels[part] = label
    return MedianCuts(tuple(int(label) for label in labels), tuple(cuts))


def _turn(axes: Array) -> Array:
    """Rows with their entry of largest magnitude positive; entries within rounding of it count as tied, first wins."""
    if axes.size == 0:
        return axes
    size = np.abs(axes)
    largest = (size >= size.max(1, keepdims=True) * (1 - 1e-9)).argmax(1)
    return np.asarray(axes * np.where(axes[np.arange(len(axes)), largest] < 0, -1.0, 1.0)[:, None])


def _cut(
    score: Array, weights: Array, names: Sequence[str], part: Labels, below: int, count: int
) -> tuple[Labels, Labels]:
    """Positions in ``part`` of the low and high side: the low one as near to below / count as it can; lower on a tie.

    Both sides keep at least as many datasets as they must become groups.
    """
    ordered = np.array(sorted(range(len(part)), key=lambda i: (score[i], names[int(part[i])])))
    weight = np.cumsum(weights[part[ordered]])
    places = np.arange(below, len(part) - (count - below) + 1)  # datasets on the low side
    imbalance = np.abs(weight[places - 1] - weight[-1] * below / count)
    place = places[int(np.argmin(imbalance))]
    return ordered[:place], ordered[place:]
