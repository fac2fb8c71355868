"""The table of split methods: every fact about a method stands in its entry here. Pure NumPy.

The options, their help, the split, the decision and the documentation read the table. To add a
method, write the function that searches and add its entry.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from merit_fast.split.search.kmeans import kernel_kmeans
from merit_fast.split.search.medians import conflict_axes, median_partition
from merit_fast.split.search.problem import Array, Labels, Problem
from merit_fast.split.search.starts import (
    heaviest_first,
    item_names,
    pca_cuts,
    pddp_cuts,
    random_deal,
)
from merit_fast.split.search.swap import balance, improve_starts, obey

_RANDOM_STARTS = 4
_KMEANS_STARTS = 8
_KMEANS_STARTS_OF_SEARCH = 2
_KICKS = 50


@dataclass(frozen=True)
class Search:
    """Everything that a method may read.

    Attributes:
        problem: items, weights, inner products and pins; of the texts for a method with
            ``needs_texts``.
        names: [N] names of the datasets, sorted.
        weights: [N] weights of the datasets, sum 1.
        uncentered: [N, N] similarity before it is centred.
        tolerance: how far a group may be from 1/K, as a share of all weight.
        generator: for random starts.
    """

    problem: Problem
    names: Sequence[str]
    weights: Array
    uncentered: Array
    tolerance: float
    generator: np.random.Generator


@dataclass(frozen=True)
class Assignment:
    """labels: [M] group of every item. cuts: (axis, score) of every median cut, in order."""

    labels: Labels
    cuts: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class SplitMethod:
    """One way to split datasets into groups.

    Attributes:
        name: value of ``split.method``.
        summary: one sentence for the documentation.
        search: puts every item into a group.
        paper: where the method was published, "" if nowhere.
        reads_gradients: False: the groups do not depend on gradients, so other numbers of groups
            are not judged.
        needs_texts: it clusters the datasets' texts instead of their gradients.
        needs_manual: the user lists the groups under ``split.manual``.
        power_of_two: K must be a power of two.
        spreads_all: every dataset's rows go to all groups.
        chooses_groups: whether ``groups: auto`` may choose K.
        seeks_balance: it looks for the best groups within the tolerance, so a looser one changes
            them.
        column_axes: scores are those of the published, column-centred PCA.
        numbers_groups: its labels number the groups; else the first name in a group does.
    """

    name: str
    summary: str
    search: Callable[[Search], Assignment]
    paper: str = ""
    reads_gradients: bool = True
    needs_texts: bool = False
    needs_manual: bool = False
    power_of_two: bool = False
    spreads_all: bool = False
    chooses_groups: bool = True
    seeks_balance: bool = False
    column_axes: bool = False
    numbers_groups: bool = False


def _pca_swap(search: Search) -> Assignment:
    problem = search.problem
    randoms = [random_deal(problem, search.generator) for _ in range(_RANDOM_STARTS)]
    starts = [
        pca_cuts(problem, search.names),
        pddp_cuts(problem, search.names),
        _kmeans_labels(search, _KMEANS_STARTS_OF_SEARCH),
        heaviest_first(problem),
        *randoms,
    ]
    kicks = _number_of_kicks(problem)
    return Assignment(improve_starts(problem, starts, search.tolerance, search.generator, kicks))


def _anti(search: Search) -> Assignment:
    problem = search.problem
    randoms = [random_deal(problem, search.generator) for _ in range(_RANDOM_STARTS)]
    starts = [heaviest_first(problem), *randoms]
    kicks = _number_of_kicks(problem)
    labels = improve_starts(problem, starts, search.tolerance, search.generator, kicks, sign=-1.0)
    return Assignment(labels)


def _pca_median(search: Search) -> Assignment:
    problem = search.problem
    # Datasets that are pinned together count with their weighted mean.
    mean = problem.share * search.weights[:, None] / problem.weights
    axes = conflict_axes(mean.T @ search.uncentered @ mean, problem.num_groups.bit_length() - 1)
    halves = median_partition(axes.scores, problem.weights, item_names(problem, search.names))
    return Assignment(obey(problem, np.array(halves.labels)), halves.cuts)


def _pddp(search: Search) -> Assignment:
    labels = obey(search.problem, pddp_cuts(search.problem, search.names))
    return Assignment(balance(search.problem, labels, search.tolerance))


def _kmeans(search: Search) -> Assignment:
    labels = _kmeans_labels(search, _KMEANS_STARTS)
    return Assignment(balance(search.problem, labels, search.tolerance))


def _random(search: Search) -> Assignment:
    labels = obey(search.problem, random_deal(search.problem, search.generator))
    return Assignment(balance(search.problem, labels, search.tolerance, sign=0.0))


def _as_pinned(search: Search) -> Assignment:
    return Assignment(search.problem.fixed.copy())


def _kmeans_labels(search: Search, starts: int) -> Labels:
    capacity = 1 / search.problem.num_groups + search.tolerance
    return kernel_kmeans(search.problem, capacity, search.generator, starts)


def _number_of_kicks(problem: Problem) -> int:
    return min(_KICKS, max(10, 6000 // len(problem.weights)))


_TABLE = (
    SplitMethod(
        "pca-swap",
        "Starts from PCA and PDDP median cuts, k-means and random deals, takes the best moves and "
        "swaps within the tolerance, disturbs the best split and improves it again.",
        _pca_swap,
        seeks_balance=True,
    ),
    SplitMethod(
        "pca-median",
        "Cuts all datasets at the weighted median of the first axis of a column-centred PCA, each "
        "half at that of the second, and so on. K is a power of two; the tolerance moves no cut.",
        _pca_median,
        paper="MERIT, arXiv 2606.01717",
        power_of_two=True,
        column_axes=True,
        numbers_groups=True,
    ),
    SplitMethod(
        "pddp",
        "Cuts each side at the weighted median of its own first axis.",
        _pddp,
        paper="Boley 1998",
    ),
    SplitMethod(
        "kmeans",
        "Runs weighted kernel k-means within the tolerance.",
        _kmeans,
        seeks_balance=True,
    ),
    SplitMethod("random", "Deals the datasets to balanced groups at random.", _random),
    SplitMethod(
        "iid",
        "Deals every dataset's rows to all groups in equal shares.",
        _as_pinned,
        reads_gradients=False,
        spreads_all=True,
        chooses_groups=False,
    ),
    SplitMethod(
        "text-cluster",
        "Runs kmeans on TF-IDF vectors of the datasets' texts instead of gradients.",
        _kmeans,
        paper="c-BTM, arXiv 2303.14177, which clusters rows",
        reads_gradients=False,
        needs_texts=True,
    ),
    SplitMethod("anti", "Searches like pca-swap, but for the smallest objective.", _anti),
    SplitMethod(
        "manual",
        "Takes the groups listed under split.manual.",
        _as_pinned,
        reads_gradients=False,
        needs_manual=True,
        chooses_groups=False,
    ),
)

METHODS: dict[str, SplitMethod] = {method.name: method for method in _TABLE}

if TYPE_CHECKING:
    Method: TypeAlias = str
else:
    Method = Literal[tuple(METHODS)]  # the options parser and the command line read the names
