"""Where searches start: cuts of principal axes, heaviest first, at random. They obey neither tolerance nor pins."""

import math
from collections.abc import Sequence

import numpy as np

from merit_fast.split.conflict import double_center
from merit_fast.split.search.medians import cut_recursively, weighted_axes
from merit_fast.split.search.problem import FREE, Array, Labels, Problem


def pca_cuts(problem: Problem, names: Sequence[str]) -> Labels:
    """Axis 0 cuts all, axis 1 each part, and so on, by weight."""
    depth = max(1, math.ceil(math.log2(problem.groups)))
    scores = weighted_axes(problem.products, problem.weights, depth).scores
    items = item_names(problem, names)
    return np.array(
        cut_recursively(
            lambda part, d: scores[part, d], problem.weights, items, problem.groups
        ).groups
    )


def pddp_cuts(problem: Problem, names: Sequence[str]) -> Labels:
    """The first axis of each part by itself cuts it (Boley 1998)."""

    def first_axis(part: Labels, _depth: int) -> Array:
        weights = problem.weights[part] / problem.weights[part].sum()
        gram = (problem.products / np.outer(problem.weights, problem.weights))[np.ix_(part, part)]
        centered = double_center(gram, weights) * np.outer(weights, weights)
        return weighted_axes(centered, weights, 1).scores[:, 0]

    items = item_names(problem, names)
    return np.array(cut_recursively(first_axis, problem.weights, items, problem.groups).groups)


def random_deal(problem: Problem, generator: np.random.Generator) -> Labels:
    """A random order dealt to the groups by weight: each item goes where most is missing."""
    return _deal(problem, generator.permutation(len(problem.weights)))


def heaviest_first(problem: Problem) -> Labels:
    return _deal(problem, np.argsort(-problem.weights, kind="stable"))


def _deal(problem: Problem, order: Labels) -> Labels:
    labels, weight = problem.fixed.copy(), np.zeros(problem.groups)
    np.add.at(weight, labels[labels != FREE], problem.weights[labels != FREE])
    for item in order:
        if labels[item] == FREE:
            labels[item] = weight.argmin()
            weight[labels[item]] += problem.weights[item]
    return labels


def item_names(problem: Problem, names: Sequence[str]) -> list[str]:
    """The first of the datasets in each item."""
    return [names[i] for i in problem.share.argmax(0)]
