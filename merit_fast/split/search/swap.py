"""Local search on the between-group sum of squares by moves and swaps. Pure NumPy."""

from collections.abc import Iterable

import numpy as np

from merit_fast.split.search.problem import FREE, Array, Labels, Problem, color_apart
from merit_fast.split.search.step import MARGIN, NEVER, Step, SwapBlock


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
    return -Step(problem, labels).move_gains()


def climb(problem: Problem, labels: Labels, limit: float, sign: float = 1.0) -> Labels:
    """Takes the best move or else the best swap, while one raises ``sign`` times the objective.

    A changed group lies at most ``limit`` from 1/K in weight. Pins hold and no group runs empty if
    this is so at the start. O(M K) for a move, O(M^2) for a swap. Ties go to the first item.
    """
    step = Step(problem, labels)
    while True:
        gains = np.where(step.movable(limit), sign * step.move_gains(), NEVER)
        gain, item, group = _best_move(gains)
        if gain > step.rounding:
            step.move(item, group)
            continue
        gain, first, second = _best_swap(step, limit, sign)
        if gain <= step.rounding:
            return step.labels
        step.swap(first, second)


def balance(problem: Problem, labels: Labels, tolerance: float, sign: float = 1.0) -> Labels:
    """Moves and swaps items until none lowers the excess sum_k max(0, |W_k - 1/K| - tolerance)^2.

    Takes the step that lowers the excess most; among several that end it, the best for ``sign``
    times the objective (0: the first).
    """
    step = Step(problem, labels)
    while True:
        now = step.excess(step.weight, tolerance).sum()
        if now <= MARGIN**2:
            return step.labels
        moves = np.where(step.movable(np.inf), step.moved_excess(tolerance), np.inf)
        lowest = min(float(moves.min()), _lowest_excess(step, tolerance))
        if lowest >= now * (1 - 1e-9):
            return step.labels
        level = max(lowest * (1 + 1e-9), MARGIN**2)
        move_gains = np.where(moves <= level, sign * step.move_gains() if sign else 0.0, NEVER)
        gain, item, group = _best_move(move_gains)
        swap_gain, first, second = _best_balancing(step, tolerance, level, sign)
        if gain >= swap_gain:
            step.move(item, group)
        else:
            step.swap(first, second)


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
    reached: dict[bytes, Labels] = {}

    def top(labels: Labels) -> Labels:
        key = labels.tobytes()
        if key not in reached:
            reached[key] = climb(problem, labels, limit + MARGIN, sign)
        return reached[key]

    climbed = [top(labels) for labels in fitting]
    best = _best(problem, climbed, sign)
    free = np.flatnonzero(problem.fixed == FREE)
    for _ in range(kicks if len(free) > 2 and problem.num_groups > 1 else 0):
        kicked = best.copy()
        count = min(len(free), int(generator.integers(2, 6)))
        chosen = generator.choice(free, size=count, replace=False)
        kicked[chosen] = kicked[np.roll(chosen, 1)]
        kicked = balance(problem, obey(problem, kicked), limit, sign)
        if fits(problem, kicked, limit):
            best = _best(problem, [best, top(kicked)], sign)
    return best


def fits(problem: Problem, labels: Labels, limit: float) -> bool:
    return imbalance(problem, labels) <= limit + MARGIN


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


def _best_move(gains: Array) -> tuple[float, int, int]:
    item, group = np.unravel_index(int(gains.argmax()), gains.shape)
    return float(gains[item, group]), int(item), int(group)


def _best_swap(step: Step, limit: float, sign: float) -> tuple[float, int, int]:
    """Returns the largest gain of a swap and its two items, the first ones on a tie."""
    best = (NEVER, -1, -1)
    for block in step.swap_blocks():
        gains = sign * step.swap_gains(block)
        gains[~step.swappable(block, limit)] = NEVER
        best = _better(best, block, gains)
    return best


def _lowest_excess(step: Step, tolerance: float) -> float:
    """Returns the lowest excess that a swap reaches; inf without a swap."""
    lowest = np.inf
    for block in step.swap_blocks():
        excess = step.swapped_excess(block, tolerance)
        lowest = min(lowest, excess[step.swappable(block, np.inf)].min(initial=np.inf))
    return float(lowest)


def _best_balancing(
    step: Step, tolerance: float, level: float, sign: float
) -> tuple[float, int, int]:
    """Returns the best swap among those of an excess of at most ``level``; sign 0: the first."""
    best = (NEVER, -1, -1)
    for block in step.swap_blocks():
        allowed = step.swapped_excess(block, tolerance) <= level
        allowed &= step.swappable(block, np.inf)
        if allowed.any():
            gains = sign * step.swap_gains(block) if sign else np.zeros(allowed.shape)
            gains[~allowed] = NEVER
            best = _better(best, block, gains)
    return best


def _better(best: tuple[float, int, int], block: SwapBlock, gains: Array) -> tuple[float, int, int]:
    row, column = np.unravel_index(int(gains.argmax()), gains.shape)
    gain = float(gains[row, column])
    if gain <= best[0]:
        return best
    return gain, int(block.rows[row]), int(block.columns[column])


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
