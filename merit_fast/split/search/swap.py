"""Local search on the between-group sum of squares: moves and swaps of items under a weight tolerance. Pure NumPy."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from merit_fast.split.search.problem import FREE, Array, Labels, Problem, color_apart

_NEVER = -np.inf
_MARGIN = 1e-12  # relative: less is rounding, not an improvement


def between_groups(problem: Problem, labels: Labels) -> float:
    """sum_k |sum_{i in k} w_i z_i|^2 / W_k: the between-group sum of squares, if z is centred."""
    members = _members(labels, problem.groups)
    inner = np.einsum("ik,ik->k", members, problem.products @ members)
    weight = members.T @ problem.weights
    return float((inner[weight > 0] / weight[weight > 0]).sum())


def imbalance(problem: Problem, labels: Labels) -> float:
    """max_k |W_k - 1/K|."""
    return float(np.abs(_group_weights(problem, labels) - 1 / problem.groups).max())


def move_losses(problem: Problem, labels: Labels) -> Array:
    """[M, K] by how much the objective falls if an item moves; +inf in its own group. Balance and pins aside."""
    return -_Step(problem, labels).move_gains()


def climb(problem: Problem, labels: Labels, limit: float, sign: float = 1.0) -> Labels:
    """Best-improvement search: the best move, or where no move helps the best swap, until neither raises
    ``sign`` times the objective.

    A group touched may come to lie at most ``limit`` from 1/K in weight; pins hold and no group runs empty, given
    that this is so at the start. O(M K) for a move, O(M^2) for a swap. Ties go to the lower item.
    """
    labels = labels.copy()
    while True:
        step = _Step(problem, labels)
        gains = np.where(step.movable(limit), sign * step.move_gains(), _NEVER)
        if gains.max() > step.rounding:
            _move(labels, gains)
            continue
        gains = np.where(step.swappable(limit), sign * step.swap_gains(), _NEVER)
        if gains.max() <= step.rounding:
            return labels
        _swap(labels, gains)


def balance(problem: Problem, labels: Labels, tolerance: float, sign: float = 1.0) -> Labels:
    """Moves and swaps that lower the excess sum_k max(0, |W_k - 1/K| - tolerance)^2 until none does.

    Of those that end it the one best for ``sign`` times the objective is taken (0: the first); else the one that
    lowers it most.
    """
    labels = labels.copy()
    while True:
        step = _Step(problem, labels)
        now = _excess(step.weight, problem.groups, tolerance).sum()
        if now <= _MARGIN**2:
            return labels
        moves, swaps = step.excess_after(tolerance)
        moves[~step.movable(np.inf)] = np.inf
        swaps[~step.swappable(np.inf)] = np.inf
        lowest = min(moves.min(), swaps.min())
        if lowest >= now * (1 - 1e-9):
            return labels
        level = max(lowest * (1 + 1e-9), _MARGIN**2)
        move_gains = np.where(moves <= level, sign * step.move_gains() if sign else 0.0, _NEVER)
        swap_gains = np.where(swaps <= level, sign * step.swap_gains() if sign else 0.0, _NEVER)
        if move_gains.max() >= swap_gains.max():
            _move(labels, move_gains)
        else:
            _swap(labels, swap_gains)


def obey(problem: Problem, labels: Labels) -> Labels:
    """The labels, changed where pins demand it and where a group would be empty; groups renumbered to fit the pins."""
    labels = _renumber(problem, labels)
    pinned = problem.fixed != FREE
    labels[pinned] = problem.fixed[pinned]
    touched = problem.apart.any(1)
    if (problem.apart & (labels[:, None] == labels)).any():
        placed = np.where(pinned | ~touched, labels, FREE)
        for item in np.flatnonzero(touched & ~pinned):
            taken = set(placed[problem.apart[item]].tolist())
            wanted = [labels[item], *np.argsort(_group_weights(problem, placed), kind="stable")]
            placed[item] = next((k for k in wanted if k not in taken), FREE)
        if (
            placed == FREE
        ).any():  # that order leads nowhere: take the way that was found when the pins were checked
            colors = color_apart(problem.apart, problem.fixed, problem.groups)
            assert colors is not None
            placed = np.where(touched, colors, labels)
        labels = placed
    for group in range(problem.groups):
        if not (labels == group).any():
            size = np.bincount(labels, minlength=problem.groups)
            spare = np.flatnonzero((size[labels] > 1) & ~pinned)
            labels[spare[np.argmin(problem.weights[spare])]] = group
    return labels


def search(
    problem: Problem,
    starts: Iterable[Labels],
    tolerance: float,
    generator: np.random.Generator,
    kicks: int,
    sign: float = 1.0,
) -> Labels:
    """The best of the starts, each climbed within the tolerance, then of ``kicks`` small disturbances of the best.

    Where no start can be brought within the tolerance, the least imbalance reached takes its place.
    """
    balanced = []
    for start in starts:
        first = balance(problem, obey(problem, start), tolerance, sign)
        # Beyond the tolerance lie better places to come back from.
        loose = climb(problem, first, max(4 * tolerance, imbalance(problem, first)), sign)
        balanced += [first, balance(problem, loose, tolerance, sign)]
    limit = max(tolerance, min(imbalance(problem, labels) for labels in balanced))
    best = _best(
        problem,
        [climb(problem, c, limit + _MARGIN, sign) for c in balanced if fits(problem, c, limit)],
        sign,
    )
    free = np.flatnonzero(problem.fixed == FREE)
    for _ in range(kicks if len(free) > 2 and problem.groups > 1 else 0):
        kicked = best.copy()
        chosen = generator.choice(
            free, size=min(len(free), int(generator.integers(2, 6))), replace=False
        )
        kicked[chosen] = kicked[np.roll(chosen, 1)]
        kicked = balance(problem, obey(problem, kicked), limit, sign)
        if fits(problem, kicked, limit):
            best = _best(problem, [best, climb(problem, kicked, limit + _MARGIN, sign)], sign)
    return best


def fits(problem: Problem, labels: Labels, limit: float) -> bool:
    return imbalance(problem, labels) <= limit + _MARGIN


def _best(problem: Problem, candidates: list[Labels], sign: float) -> Labels:
    """The first of the best: a later one must be better by more than rounding."""
    best, value = candidates[0], sign * between_groups(problem, candidates[0])
    for candidate in candidates[1:]:
        other = sign * between_groups(problem, candidate)
        if other > value + 1e-11 * (abs(value) + abs(other)):
            best, value = candidate, other
    return best


class _Step:
    """Everything one step of a search asks of the current labels."""

    def __init__(self, problem: Problem, labels: Labels) -> None:
        self.problem, self.labels = problem, labels
        self.members = _members(labels, problem.groups)
        self.weight = self.members.T @ problem.weights  # [K]
        self.size = self.members.sum(0)
        self.to_group = (
            problem.products @ self.members
        )  # [M, K] sum over the group of w_i w_j <z_i, z_j>
        self.own = self.to_group[np.arange(len(labels)), labels]
        self.inner = np.einsum("ik,ik->k", self.members, self.to_group)  # |sum w z|^2
        self.square = np.diag(problem.products)
        self.score = self.inner / np.where(self.weight > 0, self.weight, 1.0)
        self.rounding = _MARGIN * float(
            np.abs(self.score).sum() + np.abs(self.square / problem.weights).sum()
        )

    def move_gains(self) -> Array:
        weights, labels = self.problem.weights, self.labels
        left_weight = self.weight[labels] - weights
        left = self.inner[labels] - 2 * self.own + self.square
        # A group that loses its last item is gone from the sum.
        alone = self.size[labels] == 1
        left = np.where(alone, 0.0, left / np.where(alone, 1.0, left_weight))
        joined = (self.inner + 2 * self.to_group + self.square[:, None]) / (
            self.weight + weights[:, None]
        )
        gains = left[:, None] + joined - self.score[labels][:, None] - self.score
        gains[np.arange(len(labels)), labels] = _NEVER
        return np.asarray(gains)

    def swap_gains(self) -> Array:
        labels, square = self.labels, self.square
        other = self.to_group[:, labels]  # [M, M] sum_{l in group of j} of products i, l
        # What the group of i becomes when j takes the place of i; the group of j is the transpose.
        inner = (
            (self.inner[labels] - 2 * self.own + square)[:, None]
            + 2 * (other.T - self.problem.products)
            + square
        )
        ratio = inner / self._swapped_weight()
        score = self.score[labels]
        return np.asarray(ratio + ratio.T - score[:, None] - score)

    def movable(self, limit: float) -> npt.NDArray[np.bool_]:
        weights, labels, groups = self.problem.weights, self.labels, self.problem.groups
        free = (self.problem.fixed == FREE) & (self.size[labels] > 1)
        near = np.abs(self.weight[labels] - weights - 1 / groups) <= limit
        allowed = (np.abs(self.weight + weights[:, None] - 1 / groups) <= limit) & (free & near)[
            :, None
        ]
        if self.problem.apart.any():
            allowed &= self.problem.apart @ self.members == 0
        allowed[np.arange(len(labels)), labels] = False
        return np.asarray(allowed)

    def swappable(self, limit: float) -> npt.NDArray[np.bool_]:
        labels, free, apart = self.labels, self.problem.fixed == FREE, self.problem.apart
        near = np.abs(self._swapped_weight() - 1 / self.problem.groups) <= limit
        if apart.any():
            near &= (apart @ self.members)[
                :, labels
            ] - apart == 0  # nobody else there to keep apart from
        allowed = near & near.T & (labels[:, None] != labels)
        return np.asarray(allowed & free & free[:, None])

    def excess_after(self, tolerance: float) -> tuple[Array, Array]:
        """Excess of every move [M, K] and swap [M, M]."""
        labels, groups = self.labels, self.problem.groups
        now = _excess(self.weight, groups, tolerance)
        left = _excess(self.weight[labels] - self.problem.weights, groups, tolerance)[:, None]
        moves = left + _excess(self.weight + self.problem.weights[:, None], groups, tolerance)
        swapped = _excess(self._swapped_weight(), groups, tolerance)
        rest = now.sum() - now[labels]
        return moves + rest[:, None] - now, swapped + swapped.T + rest[:, None] - now[labels]

    def _swapped_weight(self) -> Array:
        """[M, M] weight of the group of i when j takes the place of i."""
        left = self.weight[self.labels] - self.problem.weights
        return np.asarray(left[:, None] + self.problem.weights)


def _move(labels: Labels, gains: Array) -> None:
    item, group = np.unravel_index(int(gains.argmax()), gains.shape)
    labels[item] = group


def _swap(labels: Labels, gains: Array) -> None:
    first, second = np.unravel_index(int(gains.argmax()), gains.shape)
    labels[first], labels[second] = labels[second], labels[first]


def _renumber(problem: Problem, labels: Labels) -> Labels:
    """Groups numbered so that most of the pinned weight is where it must be."""
    pinned = problem.fixed != FREE
    if not pinned.any():
        return labels.copy()
    agree = np.zeros((problem.groups, problem.groups))  # [group now, group demanded]
    np.add.at(agree, (labels[pinned], problem.fixed[pinned]), problem.weights[pinned])
    number = np.empty(problem.groups, np.intp)
    for _ in range(problem.groups):
        now, demanded = np.unravel_index(int(agree.argmax()), agree.shape)
        number[now] = demanded
        agree[now], agree[:, demanded] = -1.0, -1.0
    return np.asarray(number[labels])


def _members(labels: Labels, groups: int) -> Array:
    return np.asarray(labels[:, None] == np.arange(groups), np.float64)


def _group_weights(problem: Problem, labels: Labels) -> Array:
    return np.asarray(_members(labels, problem.groups).T @ problem.weights)


def _excess(weight: Array, groups: int, tolerance: float) -> Array:
    return np.asarray(np.maximum(np.abs(weight - 1 / groups) - tolerance, 0.0) ** 2)
