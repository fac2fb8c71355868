"""Groups from a similarity matrix: every method under one objective, one balance, one set of pins.

The objective is the between-group weighted sum of squares (BSS). With S centred, S_ij = <z_i, z_j>,

    BSS = sum_k W_k |mean of z over group k|^2,    W_k = sum of the weights in group k

Half of it is the gain of merging over the branches' mean loss, to second order. Pure NumPy; the
same answer for any order of the datasets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merit_fast.errors import InputError
from merit_fast.split.search.arguments import check_arguments, manual_pins, sorted_matrix
from merit_fast.split.search.methods import Assignment, Method, Search
from merit_fast.split.search.objective import double_center
from merit_fast.split.search.problem import FREE, Array, Labels, Pins, Problem, pose_problem
from merit_fast.split.search.starts import item_names
from merit_fast.split.search.swap import between_groups, imbalance, move_losses


@dataclass(frozen=True)
class Partition:
    """N datasets in K groups.

    Attributes:
        labels: [N] group of every dataset, 0..K-1, or -1 if its rows are spread over two groups or
            more in equal shares. ``pca-median`` numbers groups by the sides taken, first axis
            highest bit; pins keep their numbers; otherwise the alphabetically first dataset of a
            group numbers it.
        margins: [N] by how much the objective falls if the dataset, with those it is pinned to,
            moves to its best other group, balance aside. Negative: it would fit better there. 0
            without another group to move to.
        objective: the between-group sum of squares.
        group_weights: [K] sum 1.
        cuts: (axis, score) of every median cut (``pca-median`` only).
        note: why the tolerance is not kept, in one sentence; "" if it is.
    """

    labels: tuple[int, ...]
    margins: tuple[float, ...]
    objective: float
    group_weights: tuple[float, ...]
    cuts: tuple[tuple[int, float], ...] = ()
    note: str = ""


def partition_datasets(  # noqa: PLR0913
    similarity: Array,
    weights: Array,
    names: Sequence[str],
    num_groups: int,
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
    """Splits datasets into groups by one of the methods in ``methods.METHODS``.

    Args:
        similarity: [N, N] symmetric, centred by the weights; may be indefinite.
        weights: [N] positive: how much a dataset counts in the objective and in the balance (tokens
            or samples).
        names: [N], distinct; they break all ties.
        num_groups: K.
        method: name of the method.
        tolerance: how far a group may be from 1/K of the weight, as a share of all weight. None:
            0.05/K; inf: none.
        pins: datasets that stay together, apart or in one named group.
        spread: datasets whose rows go to all groups in equal shares.
        manual: names of each group, for ``manual``.
        uncentered: [N, N] for ``pca-median``; None: ``similarity``.
        text_similarity: [N, N] inner products of the datasets' texts, centred or not, for
            ``text-cluster``.
        seed: seed of random starts and random groups.

    Raises:
        InputError: an argument contradicts another one or cannot hold for N datasets.
    """
    weights = np.asarray(weights, np.float64)
    pins = pins or Pins()
    tolerance = 0.05 / max(num_groups, 1) if tolerance is None else tolerance
    entry = check_arguments(weights, names, num_groups, method, tolerance)
    order = _alphabetical(names)
    sorted_names = [names[i] for i in order]
    weights = weights[order] / weights.sum()
    symmetric = sorted_matrix(similarity, order, "similarity")
    symmetric = (symmetric + symmetric.T) / 2
    if entry.spreads_all:
        spread = list(names)
    if entry.needs_manual:
        pins = manual_pins(manual, names, num_groups, pins)
    problem = pose_problem(symmetric, weights, sorted_names, num_groups, pins, spread)
    searched = problem
    if entry.needs_texts:
        if text_similarity is None:
            raise InputError(
                f"{method}: must be given the similarity of the datasets' texts, got None"
            )
        texts = double_center(sorted_matrix(text_similarity, order, "text_similarity"), weights)
        searched = pose_problem(texts, weights, sorted_names, num_groups, pins, spread)
    uncentered = similarity if uncentered is None else uncentered
    assignment = entry.search(
        Search(
            searched,
            sorted_names,
            weights,
            sorted_matrix(uncentered, order, "uncentered"),
            tolerance,
            np.random.default_rng(seed),
        )
    )
    if not entry.numbers_groups:
        assignment = Assignment(_by_first_name(problem, assignment.labels), assignment.cuts)
    return _result(problem, assignment, order, sorted_names, tolerance)


def _alphabetical(names: Sequence[str]) -> Labels:
    return np.array(sorted(range(len(names)), key=lambda i: names[i]), np.intp)


def _result(
    problem: Problem,
    assignment: Assignment,
    order: Labels,
    names: Sequence[str],
    tolerance: float,
) -> Partition:
    item_labels = assignment.labels
    losses = move_losses(problem, item_labels)
    losses[np.arange(len(item_labels)), item_labels] = np.inf
    margin = losses.min(1) if problem.num_groups > 1 else np.zeros(len(item_labels))
    item = problem.share.argmax(1)
    whole = problem.share.max(1) == 1.0
    labels = np.empty(len(order), int)
    margins = np.empty(len(order))
    labels[order] = np.where(whole, item_labels[item], -1)
    margins[order] = np.where(whole, margin[item], 0.0)
    members = item_labels[:, None] == np.arange(problem.num_groups)
    return Partition(
        labels=tuple(int(label) for label in labels),
        margins=tuple(float(value) for value in margins),
        objective=between_groups(problem, item_labels),
        group_weights=tuple(float(value) for value in members.T @ problem.weights),
        cuts=assignment.cuts,
        note=_note(problem, item_labels, names, tolerance),
    )


def _note(problem: Problem, labels: Labels, names: Sequence[str], tolerance: float) -> str:
    if imbalance(problem, labels) <= tolerance + 1e-9:
        return ""
    weight = (labels[:, None] == np.arange(problem.num_groups)).T @ problem.weights
    off = np.abs(weight - 1 / problem.num_groups)
    worst = max(
        range(problem.num_groups), key=lambda k: (off[k] >= off.max() * (1 - 1e-9), weight[k])
    )
    largest = max(np.flatnonzero(labels == worst), key=lambda i: problem.weights[i])
    return (
        f"the tolerance of {tolerance:.3g} is not kept: group {worst} has {weight[worst]:.3f} "
        f"of the weight instead of {1 / problem.num_groups:.3f}; its largest dataset is "
        f"{item_names(problem, names)[largest]} with {problem.weights[largest]:.3f}"
    )


def _by_first_name(problem: Problem, labels: Labels) -> Labels:
    """Groups in the order of their first item; a group with a pinned item keeps its number."""
    kept = {int(label) for label in problem.fixed if label != FREE}
    numbers = [number for number in range(problem.num_groups) if number not in kept]
    seen = dict.fromkeys(int(label) for label in labels)
    rename = dict(zip([label for label in seen if label not in kept], numbers, strict=True))
    return np.array([rename.get(int(label), int(label)) for label in labels], np.intp)
