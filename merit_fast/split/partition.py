"""From a cosine matrix to groups: conflict axes and recursive weighted medians (MERIT, section 4). Pure NumPy."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Axes:
    """The top R principal axes: scores [N, R], explained variance shares [R]."""

    scores: Array
    explained_variance: Array


@dataclass(frozen=True)
class Partition:
    """groups: [N] labels 0..K-1. cuts: (axis, score) of every median cut, in order."""

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
    axes = axes[:count]
    largest = np.abs(axes).argmax(1)
    axes = axes * np.where(axes[np.arange(len(axes)), largest] < 0, -1.0, 1.0)[:, None]
    variance = singular**2
    shares = variance / variance.sum() if variance.sum() > 0 else np.zeros_like(variance)
    return Axes(centered @ axes.T, shares[:count])


def median_partition(scores: Array, weights: Array, names: list[str]) -> Partition:
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
    number, axes = scores.shape
    if number < 2**axes:
        raise ValueError(f"median_partition: {2**axes} groups need at least as many datasets, got {number}")
    cuts: list[tuple[int, float]] = []
    parts = [np.arange(number)]
    for axis in range(axes):
        fewest = 2 ** (axes - axis - 1)  # each side must still be divisible into that many groups
        halves = []
        for part in parts:
            low, high = _cut(scores[:, axis], weights, names, part, fewest)
            cuts.append((axis, float(scores[low[-1], axis] + scores[high[0], axis]) / 2))
            halves += [low, high]
        parts = halves
    groups = np.empty(number, int)
    for label, part in enumerate(parts):
        groups[part] = label
    return Partition(tuple(int(group) for group in groups), tuple(cuts))


def random_partition(weights: Array, names: list[str], axes: int, generator: np.random.Generator) -> Partition:
    """K = 2^axes balanced random groups: the same median cuts on random scores.

    Scores are drawn in the order of the names, so the order of the mixture does not matter.
    """
    order = np.argsort(np.array(names))
    scores = np.empty((len(names), axes))
    scores[order] = generator.standard_normal((len(names), axes))
    return median_partition(scores, weights, names)


def _cut(
    score: Array, weights: Array, names: list[str], part: npt.NDArray[np.intp], fewest: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Cuts ``part`` where both sides are nearest to half the weight; the lower place on a tie."""
    ordered = np.array(sorted(part, key=lambda i: (score[i], names[i])))
    below = np.cumsum(weights[ordered])
    places = np.arange(fewest, len(ordered) - fewest + 1)  # datasets on the low side
    imbalance = np.abs(below[places - 1] - below[-1] / 2)
    place = places[int(np.argmin(imbalance))]
    return ordered[:place], ordered[place:]
