"""Average linkage (UPGMA; Sokal and Michener 1958), so that a dendrogram can be drawn without SciPy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Join:
    """Two clusters made one. Clusters 0..N-1 are the leaves; the i-th join makes cluster N + i."""

    first: int
    second: int
    height: float  # mean distance over the pairs across the two
    size: int


def average_linkage(distance: Sequence[Sequence[float]]) -> tuple[Join, ...]:
    """N leaves to N - 1 joins, the nearest clusters first, heights never falling.

        d(a + b, c) = (|a| d(a, c) + |b| d(b, c)) / (|a| + |b|)

    Of equally near pairs the one whose clusters began with the lower leaves goes first.

    Args:
        distance: [N, N] symmetric; the diagonal is not looked at.
    """
    apart = np.array(distance, np.float64).reshape(len(distance), len(distance))
    np.fill_diagonal(apart, np.inf)
    cluster, size = list(range(len(apart))), np.ones(len(apart))
    joins: list[Join] = []
    for _ in range(len(apart) - 1):
        a, b = sorted(divmod(int(apart.argmin()), len(apart)))
        height = float(apart[a, b])
        joined = (size[a] * apart[a] + size[b] * apart[b]) / (size[a] + size[b])
        apart[a], apart[:, a] = joined, joined
        apart[a, a], apart[b], apart[:, b] = np.inf, np.inf, np.inf  # b is gone: a stands for both
        size[a] += size[b]
        joins.append(Join(cluster[a], cluster[b], height, int(size[a])))
        cluster[a] = len(apart) + len(joins) - 1
    return tuple(joins)


def leaf_order(joins: Sequence[Join]) -> list[int]:
    """The leaves so that no two branches of the tree cross."""
    number = len(joins) + 1
    order: list[int] = []
    waiting = [2 * number - 2]
    while waiting:
        node = waiting.pop()
        if node < number:
            order.append(node)
        else:
            join = joins[node - number]
            waiting += [join.second, join.first]
    return order
