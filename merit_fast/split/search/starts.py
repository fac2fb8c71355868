"""Starts of the search: cuts of principal axes, heaviest first, random.

They obey neither tolerance nor pins.
"""

import math
from collections.abc import Sequence

import numpy as np

from merit_fast.split.search.medians import cut_recursively, weighted_axes
from merit_fast.split.search.objective import double_center
from merit_fast.split.search.problem import FREE, Array, Labels, Problem


def pca_cuts(problem: Problem, names: Sequence[str]) -> Labels:
    """Cuts all items by axis 0, each half by axis 1, and so on, at weighted medians."""
    depth = max(1, math.ceil(math.log2(problem.num_groups)))
    scores = weighted_axes(problem.products, problem.weights, depth).scores
    halves = cut_recursively(
        lambda side, d: scores[side, d],
        problem.weights,
        item_names(problem, names),
        problem.num_groups,
    )
    return np.array(halves.labels)


def pddp_cuts(problem: Problem, names: Sequence[str]) -> Labels:
    """Cuts each side by its own first axis (Boley 1998)."""

    def first_axis(side: Labels, _depth: int) -> Array:
        weights = problem.weights[side] / problem.weights[side].sum()
        gram = (problem.products / np.outer(problem.weights, problem.weights))[np.ix_(side, side)]
        centered = double_center(gram, weights) * np.outer(weights, weights)
        return weighted_axes(centered, weights, 1).scores[:, 0]

    items = item_names(problem, names)
    return np.array(cut_recursively(first_axis, problem.weights, items, problem.num_groups).labels)


def random_deal(problem: Problem, generator: np.random.Generator) -> Labels:
    """Deals a random order to the groups by weight: each item goes where most weight is missing."""
    return _deal(problem, generator.permutation(len(problem.weights)))


def heaviest_first(problem: Problem) -> Labels:
    return _deal(problem, np.argsort(-problem.weights, kind="stable"))


def _deal(problem: Problem, order: Labels) -> Labels:
    labels = problem.fixed.copy()
    weight = np.zeros(problem.num_groups)
    np.add.at(weight, labels[labels != FREE], problem.weights[labels != FREE])
    for item in order:
        if labels[item] == FREE:
            labels[item] = weight.argmin()
            weight[labels[item]] += problem.weights[item]
    return labels


def item_names(problem: Problem, names: Sequence[str]) -> list[str]:
    """Name of the first dataset in each item."""
    return [names[i] for i in problem.share.argmax(0)]
