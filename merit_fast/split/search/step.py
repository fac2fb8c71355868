"""One point of the local search: gains and limits of every move and swap. Pure NumPy."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merit_fast.split.search.problem import FREE, Array, Labels, Problem

NEVER = -np.inf
MARGIN = 1e-12  # relative: less is rounding, not an improvement
_ONE_BLOCK = 128  # items whose swaps fit into one table
_RENEWED = 64  # changes after which the sums are taken again, so that rounding does not build up

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SwapBlock:
    """Swaps of some free items with others.

    Attributes:
        rows: [I] items.
        columns: [J] items.
        from_groups: [I] groups of the rows.
        to_groups: [J] groups of the columns.
        row_weight: [I, J] weight of the row's group after the swap.
        column_weight: [I, J] weight of the column's group after the swap.
    """

    rows: Labels
    columns: Labels
    from_groups: Labels
    to_groups: Labels
    row_weight: Array
    column_weight: Array


class Step:
    """Labels, and what every move and swap from there would do.

    ``move`` and ``swap`` change the labels at the cost of O(M + M K).
    """

    def __init__(self, problem: Problem, labels: Labels) -> None:
        self.problem = problem
        self.labels = labels.copy()
        self.free = problem.fixed == FREE
        self.square = np.diag(problem.products)
        self.even = 1 / problem.num_groups
        self._items = np.arange(len(labels))
        self._alone = float(np.abs(self.square / problem.weights).sum())
        self._renew()

    def move(self, item: int, group: int) -> None:
        own = self.labels[item]
        self._change(item, group)
        self._sum_up([own, group])

    def swap(self, first: int, second: int) -> None:
        own = self.labels[first]
        other = self.labels[second]
        self._change(first, other)
        self._change(second, own)
        self._sum_up([own, other])

    def move_gains(self) -> Array:
        """[M, K] rise of the objective if an item moves; -inf in its own group."""
        weights = self.problem.weights
        labels = self.labels
        left_weight = self.weight[labels] - weights
        left = self.inner[labels] - 2 * self.to_own_group + self.square
        # A group that loses its last item leaves the sum.
        last = self.size[labels] == 1
        left = np.where(last, 0.0, left / np.where(last, 1.0, left_weight))
        gains = self._joined + (left - self.score[labels])
        gains[labels, self._items] = NEVER
        return np.asarray(gains.T)

    def movable(self, limit: float) -> Mask:
        """[M, K] moves that keep the pins, fill every group and keep changed groups balanced."""
        weights = self.problem.weights
        labels = self.labels
        near = np.abs(self.weight[labels] - weights - self.even) <= limit
        near &= self.free & (self.size[labels] > 1)
        allowed = np.abs(self.weight[:, None] + weights - self.even) <= limit
        allowed &= near
        if self.problem.keeps_apart:
            allowed &= self.members @ self.problem.apart == 0
        allowed[labels, self._items] = False
        return np.asarray(allowed.T)

    def moved_excess(self, tolerance: float) -> Array:
        """[M, K] excess over the tolerance after every move."""
        labels = self.labels
        weights = self.problem.weights
        now = self.excess(self.weight, tolerance)
        left = self.excess(self.weight[labels] - weights, tolerance)[:, None]
        moves = left + self.excess(self.weight + weights[:, None], tolerance)
        return np.asarray(moves + (now.sum() - now[labels])[:, None] - now)

    def swap_blocks(self) -> Iterator[SwapBlock]:
        """Yields all swaps: few items in one block, of many those of each group with later ones."""
        free = np.flatnonzero(self.free)
        if len(free) <= _ONE_BLOCK:
            yield self._block(free, free)
            return
        labels = self.labels[free]
        for group in range(self.problem.num_groups - 1):
            rows = free[labels == group]
            columns = free[labels > group]
            if len(rows) and len(columns):
                yield self._block(rows, columns)

    def swappable(self, block: SwapBlock, limit: float) -> Mask:
        """[I, J] swaps of a block that keep the pins and the balance of both groups."""
        allowed = np.abs(block.row_weight - self.even) <= limit
        allowed &= np.abs(block.column_weight - self.even) <= limit
        if len(block.rows) == len(block.columns):
            allowed &= block.from_groups[:, None] != block.to_groups
        if self.problem.keeps_apart:
            # No other item of that group must stay apart from the newcomer.
            apart = self.problem.apart
            against = apart @ self.members.T
            pairs = apart[np.ix_(block.rows, block.columns)]
            allowed &= against[np.ix_(block.columns, block.from_groups)].T - pairs == 0
            allowed &= against[np.ix_(block.rows, block.to_groups)] - pairs == 0
        return np.asarray(allowed)

    def swapped_excess(self, block: SwapBlock, tolerance: float) -> Array:
        """[I, J] excess over the tolerance after every swap of a block."""
        now = self.excess(self.weight, tolerance)
        swapped = self.excess(block.row_weight, tolerance)
        swapped += self.excess(block.column_weight, tolerance)
        rest = now.sum() - now[block.from_groups]
        return np.asarray(swapped + rest[:, None] - now[block.to_groups])

    def swap_gains(self, block: SwapBlock) -> Array:
        """[I, J] rise of the objective by every swap of a block."""
        rows = block.rows
        columns = block.columns
        without = self.inner[self.labels] - 2 * self.to_own_group + self.square
        products = self.problem.products[np.ix_(rows, columns)]
        gains = self.to_group[np.ix_(block.from_groups, columns)] - products
        gains *= 2
        gains += without[rows][:, None]
        gains += self.square[columns]
        gains /= block.row_weight
        if rows is columns:
            other = gains.T.copy()
        else:
            other = self.to_group[np.ix_(block.to_groups, rows)].T.copy()
            other -= products
            other *= 2
            other += without[columns]
            other += self.square[rows][:, None]
            other /= block.column_weight
        gains += other
        gains -= self.score[block.from_groups][:, None]
        gains -= self.score[block.to_groups]
        return np.asarray(gains)

    def excess(self, weight: Array, tolerance: float) -> Array:
        """Squared distance of a group's weight from 1/K beyond the tolerance."""
        return np.asarray(np.maximum(np.abs(weight - self.even) - tolerance, 0.0) ** 2)

    def _block(self, rows: Labels, columns: Labels) -> SwapBlock:
        from_groups = self.labels[rows]
        to_groups = self.labels[columns]
        weights = self.problem.weights
        row_left = self.weight[from_groups] - weights[rows]
        column_left = self.weight[to_groups] - weights[columns]
        return SwapBlock(
            rows,
            columns,
            from_groups,
            to_groups,
            row_left[:, None] + weights[columns],
            column_left + weights[rows][:, None],
        )

    def _change(self, item: int, group: int) -> None:
        own = self.labels[item]
        self.labels[item] = group
        self.members[own, item] = 0.0
        self.members[group, item] = 1.0
        self.to_group[own] -= self.problem.products[item]
        self.to_group[group] += self.problem.products[item]
        self._changes += 1

    def _renew(self) -> None:
        number = self.problem.num_groups
        self.members = np.asarray(self.labels == np.arange(number)[:, None], np.float64)  # [K, M]
        # [K, M] sum over the group of w_i w_j <z_i, z_j>
        self.to_group = self.members @ self.problem.products
        self.weight = np.empty(number)
        self.size = np.empty(number)
        self.inner = np.empty(number)  # |sum w z|^2
        self.score = np.empty(number)
        self._joined = np.empty_like(self.to_group)  # rise of a group that an item joins
        self._changes = 0
        self._sum_up(range(number))

    def _sum_up(self, changed: Iterable[int]) -> None:
        if self._changes >= _RENEWED:
            self._renew()
            return
        weights = self.problem.weights
        for group in changed:
            members = self.members[group]
            to_group = self.to_group[group]
            weight = float(members @ weights)
            inner = float(members @ to_group)
            score = inner / weight if weight > 0 else inner
            joined = 2 * to_group
            joined += inner
            joined += self.square
            joined /= weight + weights
            joined -= score
            self.weight[group] = weight
            self.size[group] = members.sum()
            self.inner[group] = inner
            self.score[group] = score
            self._joined[group] = joined
        self.to_own_group = self.to_group[self.labels, self._items]
        self.rounding = MARGIN * float(np.abs(self.score).sum() + self._alone)
