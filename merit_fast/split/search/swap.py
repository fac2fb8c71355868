"""Local search on the between-group sum of squares by moves and swaps. Pure NumPy."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from merit_fast.split.search.problem import FREE, Array, Labels, Problem, color_apart

_NEVER = -np.inf
_MARGIN = 1e-12  # relative: less is rounding, not an improvement


def between_groups(problem: Problem, labels: Labels) -> float:
    """sum_k |sum_{i in k} w_i z_i|^2 / W_k: the between-group sum of squares, if z is centred."""
    members = _members(labels, problem.num_groups)
    inner = np.einsum("ik,ik->k", members, problem.products @ members)
    weight = members.T @ problem.weights
    return float((inner[weight > 0] / weight[weight > 0]).sum())


def imbalance(problem: Problem, labels: Labels) -> float:
    """max_k |W_k - 1/K|."""
    return float(np.abs(_group_weights(problem, labels) - 1 / problem.num_groups).max())


def move_losses(problem: Problem, labels: Labels) -> Array:
    """[M, K] fall of the objective if an item moves; +inf in its own group. Ignores balance."""
    return -_Step(problem, labels).move_gains()


def climb(problem: Problem, labels: Labels, limit: float, sign: float = 1.0) -> Labels:
    """Takes the best move or else the best swap, while one raises ``sign`` times the objective.

    A changed group lies at most ``limit`` from 1/K in weight. Pins hold and no group runs empty if
    this is so at the start. O(M K) for a move, O(M^2) for a swap. Ties go to the lower item.
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
    """Moves and swaps items until none lowers the excess sum_k max(0, |W_k - 1/K| - tolerance)^2.

    Takes the step that lowers the excess most; among several that end it, the best for ``sign``
    times the objective (0: the first).
    """
    labels = labels.copy()
    while True:
        step = _Step(problem, labels)
        now = _excess(step.weight, problem.num_groups, tolerance).sum()
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
    """Changes labels where pins demand it or a group is empty; renumbers groups to fit pins."""
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
        if (placed == FREE).any():  # that order gets stuck; the check of the pins has a solution
            colors = color_apart(problem.apart, problem.fixed, problem.num_groups)
            assert colors is not None
            placed = np.where(touched, colors, labels)
        labels = placed
    for group in range(problem.num_groups):
        if not (labels == group).any():
            size = np.bincount(labels, minlength=problem.num_groups)
            spare = np.flatnonzero((size[labels] > 1) & ~pinned)
            labels[spare[np.argmin(problem.weights[spare])]] = group
    return labels


def improve_starts(
    problem: Problem,
    starts: Iterable[Labels],
    tolerance: float,
    generator: np.random.Generator,
    kicks: int,
    sign: float = 1.0,
) -> Labels:
    """Climbs from every start within the tolerance, then from ``kicks`` disturbances of the best.

    Returns the best split.

    If no start reaches the tolerance, the least imbalance reached replaces it.
    """
    balanced = []
    for start in starts:
        first = balance(problem, obey(problem, start), tolerance, sign)
        # A detour beyond the tolerance may lead back to a better split.
        loose = climb(problem, first, max(4 * tolerance, imbalance(problem, first)), sign)
        balanced += [first, balance(problem, loose, tolerance, sign)]
    limit = max(tolerance, min(imbalance(problem, labels) for labels in balanced))
    fitting = [labels for labels in balanced if fits(problem, labels, limit)]
    climbed = [climb(problem, labels, limit + _MARGIN, sign) for labels in fitting]
    best = _best(problem, climbed, sign)
    free = np.flatnonzero(problem.fixed == FREE)
    for _ in range(kicks if len(free) > 2 and problem.num_groups > 1 else 0):
        kicked = best.copy()
        count = min(len(free), int(generator.integers(2, 6)))
        chosen = generator.choice(free, size=count, replace=False)
        kicked[chosen] = kicked[np.roll(chosen, 1)]
        kicked = balance(problem, obey(problem, kicked), limit, sign)
        if fits(problem, kicked, limit):
            best = _best(problem, [best, climb(problem, kicked, limit + _MARGIN, sign)], sign)
    return best


def fits(problem: Problem, labels: Labels, limit: float) -> bool:
    return imbalance(problem, labels) <= limit + _MARGIN


def _best(problem: Problem, candidates: list[Labels], sign: float) -> Labels:
    """The best candidate; a later one must be better by more than rounding."""
    best = candidates[0]
    value = sign * between_groups(problem, best)
    for candidate in candidates[1:]:
        other = sign * between_groups(problem, candidate)
        if other > value + 1e-11 * (abs(value) + abs(other)):
            best = candidate
            value = other
    return best


class _Step:
    """Gains and limits of every move and swap from the current labels."""

    def __init__(self, problem: Problem, labels: Labels) -> None:
        self.problem = problem
        self.labels = labels
        self.members = _members(labels, problem.num_groups)
        self.weight = self.members.T @ problem.weights  # [K]
        self.size = self.members.sum(0)
        # [M, K] sum over the group of w_i w_j <z_i, z_j>
        self.to_group = problem.products @ self.members
        self.to_own_group = self.to_group[np.arange(len(labels)), labels]
        self.inner = np.einsum("ik,ik->k", self.members, self.to_group)  # |sum w z|^2
        self.square = np.diag(problem.products)
        self.score = self.inner / np.where(self.weight > 0, self.weight, 1.0)
        magnitude = np.abs(self.score).sum() + np.abs(self.square / problem.weights).sum()
        self.rounding = _MARGIN * float(magnitude)

    def move_gains(self) -> Array:
        weights = self.problem.weights
        labels = self.labels
        left_weight = self.weight[labels] - weights
        left = self.inner[labels] - 2 * self.to_own_group + self.square
        # A group that loses its last item leaves the sum.
        last = self.size[labels] == 1
        left = np.where(last, 0.0, left / np.where(last, 1.0, left_weight))
        joined = (self.inner + 2 * self.to_group + self.square[:, None]) / (
            self.weight + weights[:, None]
        )
        gains = left[:, None] + joined - self.score[labels][:, None] - self.score
        gains[np.arange(len(labels)), labels] = _NEVER
        return np.asarray(gains)

    def swap_gains(self) -> Array:
        labels = self.labels
        square = self.square
        other = self.to_group[:, labels]  # [M, M] sum_{l in group of j} of products i, l
        # The group of i after j replaces i; the group of j is the transpose.
        inner = (
            (self.inner[labels] - 2 * self.to_own_group + square)[:, None]
            + 2 * (other.T - self.problem.products)
            + square
        )
        ratio = inner / self._swapped_weight()
        score = self.score[labels]
        return np.asarray(ratio + ratio.T - score[:, None] - score)

    def movable(self, limit: float) -> npt.NDArray[np.bool_]:
        weights = self.problem.weights
        labels = self.labels
        even = 1 / self.problem.num_groups
        free = (self.problem.fixed == FREE) & (self.size[labels] > 1)
        near = np.abs(self.weight[labels] - weights - even) <= limit
        allowed = np.abs(self.weight + weights[:, None] - even) <= limit
        allowed &= (free & near)[:, None]
        if self.problem.apart.any():
            allowed &= self.problem.apart @ self.members == 0
        allowed[np.arange(len(labels)), labels] = False
        return np.asarray(allowed)

    def swappable(self, limit: float) -> npt.NDArray[np.bool_]:
        labels = self.labels
        free = self.problem.fixed == FREE
        apart = self.problem.apart
        near = np.abs(self._swapped_weight() - 1 / self.problem.num_groups) <= limit
        if apart.any():
            # No other item of that group must stay apart from the newcomer.
            near &= (apart @ self.members)[:, labels] - apart == 0
        allowed = near & near.T & (labels[:, None] != labels)
        return np.asarray(allowed & free & free[:, None])

    def excess_after(self, tolerance: float) -> tuple[Array, Array]:
        """Excess after every move [M, K] and swap [M, M]."""
        labels = self.labels
        weights = self.problem.weights
        num_groups = self.problem.num_groups
        now = _excess(self.weight, num_groups, tolerance)
        left = _excess(self.weight[labels] - weights, num_groups, tolerance)[:, None]
        moves = left + _excess(self.weight + weights[:, None], num_groups, tolerance)
        swapped = _excess(self._swapped_weight(), num_groups, tolerance)
        rest = now.sum() - now[labels]
        return moves + rest[:, None] - now, swapped + swapped.T + rest[:, None] - now[labels]

    def _swapped_weight(self) -> Array:
        """[M, M] weight of the group of i after j replaces i."""
        left = self.weight[self.labels] - self.problem.weights
        return np.asarray(left[:, None] + self.problem.weights)


def _move(labels: Labels, gains: Array) -> None:
    item, group = np.unravel_index(int(gains.argmax()), gains.shape)
    labels[item] = group


def _swap(labels: Labels, gains: Array) -> None:
    first, second = np.unravel_index(int(gains.argmax()), gains.shape)
    labels[first], labels[second] = labels[second], labels[first]


def _renumber(problem: Problem, labels: Labels) -> Labels:
    """Renumbers the groups so that most of the pinned weight is in its demanded group."""
    pinned = problem.fixed != FREE
    if not pinned.any():
        return labels.copy()
    agree = np.zeros((problem.num_groups, problem.num_groups))  # [group now, group demanded]
    np.add.at(agree, (labels[pinned], problem.fixed[pinned]), problem.weights[pinned])
    number = np.empty(problem.num_groups, np.intp)
    for _ in range(problem.num_groups):
        now, demanded = np.unravel_index(int(agree.argmax()), agree.shape)
        number[now] = demanded
        agree[now] = -1.0
        agree[:, demanded] = -1.0
    return np.asarray(number[labels])


def _members(labels: Labels, num_groups: int) -> Array:
    return np.asarray(labels[:, None] == np.arange(num_groups), np.float64)


def _group_weights(problem: Problem, labels: Labels) -> Array:
    return np.asarray(_members(labels, problem.num_groups).T @ problem.weights)


def _excess(weight: Array, num_groups: int, tolerance: float) -> Array:
    return np.asarray(np.maximum(np.abs(weight - 1 / num_groups) - tolerance, 0.0) ** 2)
