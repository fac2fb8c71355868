"""Packs an epoch's examples into rows by best fit, and deals the rows to the epoch's steps."""

import bisect
import heapq
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from merit_fast.train.config import TrainConfig

Row = NDArray[np.int64]  # indices of the examples of one packed row


class PackedSchedule:
    """The rows of every step of a run.

    An epoch has as many steps as without packing, so a step has ``batch_size`` examples on average.
    With S steps an epoch, and rows of

        limit = max(longest example, min(row_length, tokens / (S * accumulation)))

    tokens at most, the model reads one row at a time. Rows depend only on the lengths, the seed and
    the epoch.

    Args:
        lengths: [N] tokens of each example.
        config: the recipe.
        row_length: tokens of the longest row; None: no limit but that of ``accumulation``.
    """

    def __init__(
        self, lengths: NDArray[np.int64], config: TrainConfig, row_length: int | None = None
    ) -> None:
        self.lengths = lengths
        self.config = config
        self.steps_per_epoch = math.ceil(len(lengths) / config.batch_size)
        share = int(lengths.sum()) // (self.steps_per_epoch * config.accumulation)
        limit = share if row_length is None else min(row_length, share)
        self.limit = max(limit, int(lengths.max()))
        self._epoch = lru_cache(maxsize=1)(self._make_epoch)

    def rows(self, step: int) -> list[Row]:
        """The rows of a step: at least one, each with at least one example."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[number]

    def count_tokens(self, steps: int) -> int:
        """Tokens that pass through the model in ``steps`` steps."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        rows = [
            row for step in range(rest) for row in self.rows(epochs * self.steps_per_epoch + step)
        ]
        return epochs * int(self.lengths.sum()) + sum(int(self.lengths[row].sum()) for row in rows)

    def _make_epoch(self, epoch: int) -> list[list[Row]]:
        generator = np.random.default_rng([self.config.seed, epoch])
        order = generator.permutation(len(self.lengths))
        packed = best_fit(self.lengths[order], self.limit)
        rows = split_rows([order[row] for row in packed], self.steps_per_epoch)
        shuffled = generator.permutation(len(rows))
        dealt = np.array_split(shuffled, self.steps_per_epoch)
        return [[rows[int(number)] for number in numbers] for numbers in dealt]


def best_fit(lengths: NDArray[np.int64], limit: int) -> list[Row]:
    """Puts the longest example first, each into the fullest row that has room for it.

    Examples of one length keep their order.

    Args:
        lengths: [N] tokens of each example, each at most ``limit``.
        limit: tokens of the longest row.

    Returns:
        The indices of every row's examples, in ascending order; each index comes once.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> rows
    free: list[int] = []  # the keys of with_room, ascending
    order = np.argsort(-lengths, kind="stable")
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect.bisect_left(free, length)
        if place == len(free):
            number = len(rows)
            room = limit
            rows.append([])
        else:
            room = free[place]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room]
                free.pop(place)
        rows[number].append(index)
        left = room - length
        if left and left not in with_room:
            with_room[left] = []
            bisect.insort(free, left)
        if left:
            with_room[left].append(number)
    return [np.sort(np.array(row, np.int64)) for row in rows]


def split_rows(rows: list[Row], least: int) -> list[Row]:
    """Halves the rows of the most examples until there are ``least`` rows.

    Args:
        rows: rows of at least ``least`` examples in all.
        least: smallest number of rows.
    """
    heap = [(-len(row), number) for number, row in enumerate(rows)]
    heapq.heapify(heap)
    rows = list(rows)
    while len(rows) < least:
        _, number = heapq.heappop(heap)
        row = rows[number]
        middle = len(row) // 2
        rows[number] = row[:middle]
        rows.append(row[middle:])
        for changed in (number, len(rows) - 1):
            heapq.heappush(heap, (-len(rows[changed]), changed))
    return rows
