"""From a similarity matrix to groups: every way of splitting, under one objective, one balance and one set of pins.

The objective is the between-group weighted sum of squares (BSS). With S centred, S_ij = <z_i, z_j>,

    BSS = sum_k W_k |mean of z over group k|^2,    W_k = sum of the weights in group k

and half of it is the gain of merging over the branches' mean loss, to second order. Pure NumPy; the same answer for
any order of the datasets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from merit_fast.errors import InputError, show
from merit_fast.split.conflict import double_center
from merit_fast.split.search.kmeans import kernel_kmeans
from merit_fast.split.search.medians import Axes, MedianCuts, conflict_axes, median_partition
from merit_fast.split.search.problem import FREE, Array, Labels, Pins, Problem, pose_problem
from merit_fast.split.search.starts import (
    heaviest_first,
    item_names,
    pca_cuts,
    pddp_cuts,
    random_deal,
)
from merit_fast.split.search.swap import (
    balance,
    between_groups,
    imbalance,
    move_losses,
    obey,
    search,
)

Method = Literal[
    "pca-swap", "pca-median", "pddp", "kmeans", "random", "iid", "text-cluster", "anti", "manual"
]
METHODS: tuple[str, ...] = get_args(Method)
__all__ = [
    "METHODS",
    "Axes",
    "MedianCuts",
    "Method",
    "Partition",
    "Pins",
    "conflict_axes",
    "median_partition",
    "partition",
    "random_groups",
]

_RANDOM_STARTS = 4
_KMEANS_STARTS = 8
_KICKS = 50


@dataclass(frozen=True)
class Partition:
    """N datasets in K groups.

    Attributes:
        groups: [N] labels 0..K-1, -1 for a dataset whose rows are spread over two groups or more in equal shares.
            ``pca-median`` numbers groups by the sides taken, first axis highest bit; pins keep their numbers; all else
            is numbered by the alphabetically first dataset of a group.
        margins: [N] by how much the objective falls if the dataset, with those it is pinned to, moves to its best other
            group, balance aside. Negative: it would fit better there. 0 where there is no other group to move to.
        objective: the between-group sum of squares.
        group_weights: [K] sum 1.
        cuts: (axis, score) of every median cut (``pca-median`` only).
        note: why the tolerance is not kept, in one sentence; "" if it is.
    """

    groups: tuple[int, ...]
    margins: tuple[float, ...]
    objective: float
    group_weights: tuple[float, ...]
    cuts: tuple[tuple[int, float], ...] = ()
    note: str = ""


def partition(
    similarity: Array,
    weights: Array,
    names: Sequence[str],
    groups: int,
    method: Method = "pca-swap",
    *,
    tolerance: float | None = None,
    pins: Pins | None = None,
    spread: Sequence[str] = (),
    manual: Sequence[Sequence[str]] | None = None,
    uncentered: Array | None = None,
    text_similarity: Array | None = None,
    seed: int = 0,
) -> Partition:
    """Splits datasets into groups.

    - ``pca-swap``: from several starts (PCA and PDDP median cuts, k-means, random) the best moves and swaps on the BSS
      within the tolerance, then some disturbances of the best, repaired and improved again.
    - ``pca-median``: the paper: unweighted column-centred PCA of ``uncentered``, recursive weighted medians, K = 2^r.
      The medians are its balance: a tolerance does not move them.
    - ``pddp``: recursive weighted medians on the first weighted axis of each part by itself (Boley 1998).
    - ``kmeans``: weighted kernel k-means within the tolerance.
    - ``random``: random balanced groups.   ``anti``: the search of ``pca-swap`` for the smallest BSS.
    - ``iid``: every dataset's rows over all groups (``data.shares`` deals them). Its BSS is 0.
    - ``text-cluster``: k-means on ``text_similarity`` in place of gradients (c-BTM, arXiv 2303.14177, which clusters
      rows: see ``text_cluster``).
    - ``manual``: the names of ``manual``, checked.

    Args:
        similarity: [N, N] symmetric, centred by the weights; may be indefinite.
        weights: [N] positive: what a dataset counts in the objective and in the balance (tokens or samples).
        names: [N], distinct; they break all ties.
        groups: K.
        tolerance: how far a group may be from 1/K of the weight, as a share of all weight. None: 0.05/K; inf: none.
        pins: datasets that stay together, apart or in a given group.
        spread: datasets whose rows go to all groups in equal shares.
        manual: names of each group, for ``manual``.
        uncentered: [N, N] for ``pca-median``; None: ``similarity``.
        text_similarity: [N, N] inner products of the datasets' texts, centred or not, for ``text-cluster``.
        seed: of the random starts, ``kmeans`` and ``random``.

    Raises:
        InputError: what is asked for contradicts itself or cannot be had with N datasets.
    """
    weights, pins = np.asarray(weights, np.float64), pins or Pins()
    tolerance = 0.05 / max(groups, 1) if tolerance is None else tolerance
    _check(weights, names, groups, method, tolerance)
    spread = list(names) if method == "iid" else spread
    order = np.array(sorted(range(len(names)), key=lambda i: names[i]), np.intp)
    sorted_names, weights = [names[i] for i in order], weights[order] / weights.sum()
    symmetric = _sort(similarity, order, "similarity", len(names))
    symmetric = (symmetric + symmetric.T) / 2
    if method == "manual":
        pins = _manual_pins(manual, names, groups, pins)
    problem = pose_problem(symmetric, weights, sorted_names, groups, pins, spread)
    generator = np.random.default_rng(seed)
    cuts: tuple[tuple[int, float], ...] = ()
    if method == "pca-median":
        cosine = _sort(
            similarity if uncentered is None else uncentered, order, "uncentered", len(names)
        )
        part = (
            problem.share * weights[:, None] / problem.weights
        )  # weighted means of what is pinned together
        cut = median_partition(
            conflict_axes(part.T @ cosine @ part, groups.bit_length() - 1).scores,
            problem.weights,
            item_names(problem, sorted_names),
        )
        labels, cuts = obey(problem, np.array(cut.groups)), cut.cuts
    elif method == "text-cluster":
        if text_similarity is None:
            raise InputError(
                "text-cluster: must be given the similarity of the datasets' texts, got None"
            )
        texts = double_center(_sort(text_similarity, order, "text_similarity", len(names)), weights)
        of_texts = pose_problem(texts, weights, sorted_names, groups, pins, spread)
        labels = _split(of_texts, "kmeans", tolerance, generator, sorted_names)
    else:
        labels = _split(problem, method, tolerance, generator, sorted_names)
    return _result(
        problem, labels, order, sorted_names, tolerance, cuts, renumber=method != "pca-median"
    )


def random_groups(
    weights: Array,
    names: Sequence[str],
    groups: int,
    count: int,
    *,
    tolerance: float | None = None,
    pins: Pins | None = None,
    seed: int = 0,
) -> Labels:
    """[count, N] labels of as many random splits, balanced and pinned like the split they are the null of."""
    order = np.array(sorted(range(len(names)), key=lambda i: names[i]), np.intp)
    weights = np.asarray(weights, np.float64)[order] / np.sum(weights)
    nothing = np.zeros((len(names), len(names)))
    problem = pose_problem(nothing, weights, [names[i] for i in order], groups, pins or Pins(), ())
    tolerance = 0.05 / groups if tolerance is None else tolerance
    generator = np.random.default_rng(seed)
    labels = np.empty((count, len(names)), np.intp)
    for row in labels:
        split = balance(
            problem, obey(problem, random_deal(problem, generator)), tolerance, sign=0.0
        )
        row[order] = split[problem.share.argmax(1)]
    return labels


def _split(
    problem: Problem,
    method: str,
    tolerance: float,
    generator: np.random.Generator,
    names: Sequence[str],
) -> Labels:
    if method == "kmeans":
        labels = kernel_kmeans(problem, 1 / problem.groups + tolerance, generator, _KMEANS_STARTS)
        return balance(problem, labels, tolerance)
    if method == "pddp":
        return balance(problem, obey(problem, pddp_cuts(problem, names)), tolerance)
    if method == "random":
        return balance(problem, obey(problem, random_deal(problem, generator)), tolerance, sign=0.0)
    if method in ("iid", "manual"):
        return problem.fixed.copy()
    kicks = min(_KICKS, max(10, 6000 // len(problem.weights)))
    randoms = [random_deal(problem, generator) for _ in range(_RANDOM_STARTS)]
    if method == "anti":
        return search(
            problem, [heaviest_first(problem), *randoms], tolerance, generator, kicks, sign=-1.0
        )
    means = kernel_kmeans(problem, 1 / problem.groups + tolerance, generator, 2)
    starts = [
        pca_cuts(problem, names),
        pddp_cuts(problem, names),
        means,
        heaviest_first(problem),
        *randoms,
    ]
    return search(problem, starts, tolerance, generator, kicks)


def _result(
    problem: Problem,
    labels: Labels,
    order: Labels,
    names: Sequence[str],
    tolerance: float,
    cuts: tuple[tuple[int, float], ...],
    renumber: bool,
) -> Partition:
    if renumber:
        labels = _by_first_name(problem, labels)
    losses = move_losses(problem, labels)
    losses[np.arange(len(labels)), labels] = np.inf
    margin = losses.min(1) if problem.groups > 1 else np.zeros(len(labels))
    item = problem.share.argmax(1)
    whole = problem.share.max(1) == 1.0
    groups, margins = np.empty(len(order), int), np.empty(len(order))
    groups[order] = np.where(whole, labels[item], -1)
    margins[order] = np.where(whole, margin[item], 0.0)
    members = labels[:, None] == np.arange(problem.groups)
    return Partition(
        groups=tuple(int(group) for group in groups),
        margins=tuple(float(value) for value in margins),
        objective=between_groups(problem, labels),
        group_weights=tuple(float(value) for value in members.T @ problem.weights),
        cuts=cuts,
        note=_note(problem, labels, names, tolerance),
    )


def _note(problem: Problem, labels: Labels, names: Sequence[str], tolerance: float) -> str:
    if imbalance(problem, labels) <= tolerance + 1e-9:
        return ""
    weight = (labels[:, None] == np.arange(problem.groups)).T @ problem.weights
    off = np.abs(weight - 1 / problem.groups)
    worst = max(range(problem.groups), key=lambda k: (off[k] >= off.max() * (1 - 1e-9), weight[k]))
    largest = max(np.flatnonzero(labels == worst), key=lambda i: problem.weights[i])
    return (
        f"the tolerance of {tolerance:.3g} is not kept: group {worst} has {weight[worst]:.3f} of the weight instead of "
        f"{1 / problem.groups:.3f}; its largest dataset is {item_names(problem, names)[largest]} with "
        f"{problem.weights[largest]:.3f}"
    )


def _by_first_name(problem: Problem, labels: Labels) -> Labels:
    """Groups in the order of their first item; a group with a pinned item keeps its number."""
    kept = {int(group) for group in problem.fixed if group != FREE}
    numbers = [group for group in range(problem.groups) if group not in kept]
    seen = dict.fromkeys(int(label) for label in labels)
    rename = dict(zip([label for label in seen if label not in kept], numbers, strict=True))
    return np.array([rename.get(int(label), int(label)) for label in labels], np.intp)


def _manual_pins(
    manual: Sequence[Sequence[str]] | None, names: Sequence[str], groups: int, pins: Pins
) -> Pins:
    if manual is None or len(manual) != groups:
        raise InputError(f"manual: must list the datasets of {groups} groups, got {show(manual)}")
    place: dict[str, int] = {}
    for group, listed in enumerate(manual):
        for name in listed:
            if place.setdefault(name, group) != group:
                raise InputError(
                    f"manual: {name} must be in one group, got {place[name]} and {group}"
                )
    missing = sorted(set(names) - set(place))
    if missing:
        raise InputError(f"manual: must name every dataset, got none of {show(missing)}")
    empty = [group for group, listed in enumerate(manual) if not listed]
    if empty:
        raise InputError(f"manual: no group may be empty, got group {empty[0]}")
    for name, wanted in pins.group.items():
        if place.get(name, wanted) != wanted:
            raise InputError(f"manual: {name} is pinned to group {wanted}, got {place[name]}")
    return Pins(together=pins.together, apart=pins.apart, group=place)


def _check(
    weights: Array, names: Sequence[str], groups: int, method: str, tolerance: float
) -> None:
    if method not in METHODS:
        raise InputError(f"method: must be one of {', '.join(METHODS)}, got {show(method)}")
    if groups < 1:
        raise InputError(f"groups: must be at least 1, got {groups}")
    if method == "pca-median" and groups & (groups - 1):
        raise InputError(f"groups: must be a power of two with method pca-median, got {groups}")
    if not names or len(set(names)) != len(names):
        twice = next((name for name in names if list(names).count(name) > 1), None)
        raise InputError(
            f"names: must be distinct and at least one, got {show(twice or list(names))}"
        )
    if len(weights) != len(names) or not (np.isfinite(weights).all() and (weights > 0).all()):
        bad = [
            name for name, weight in zip(names, weights, strict=False) if not 0 < weight < np.inf
        ]
        raise InputError(
            f"weights: must be one positive number per dataset, got {show(weights.tolist())} ({bad})"
        )
    if not tolerance >= 0:
        raise InputError(f"tolerance: must be 0 or more, got {tolerance}")


def _sort(matrix: Array, order: Labels, what: str, number: int) -> Array:
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape != (number, number) or not np.isfinite(matrix).all():
        raise InputError(
            f"{what}: must be finite and [{number}, {number}], got {list(matrix.shape)}"
        )
    return np.asarray(matrix[np.ix_(order, order)])
