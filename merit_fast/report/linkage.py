"""Average linkage (UPGMA; Sokal and Michener 1958): the tree of a dendrogram, without SciPy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merit_fast.manifests.schemas import SplitManifest


@dataclass(frozen=True)
class Join:
    """Two clusters joined into one. Clusters 0..N-1 are the leaves; join i makes cluster N + i."""

    first: int
    second: int
    height: float  # mean distance over the pairs across the two
    size: int


def average_linkage(distance: Sequence[Sequence[float]]) -> tuple[Join, ...]:
    """Joins N leaves in N - 1 steps, the nearest clusters first; heights never fall.

        d(a + b, c) = (|a| d(a, c) + |b| d(b, c)) / (|a| + |b|)

    Among equally near pairs, the pair whose clusters began with the lower leaves is joined first.

    Args:
        distance: [N, N] symmetric; the diagonal is ignored.
    """
    apart = np.array(distance, np.float64).reshape(len(distance), len(distance))
    np.fill_diagonal(apart, np.inf)
    cluster = list(range(len(apart)))
    size = np.ones(len(apart))
    joins: list[Join] = []
    for _ in range(len(apart) - 1):
        a, b = sorted(divmod(int(apart.argmin()), len(apart)))
        height = float(apart[a, b])
        joined = (size[a] * apart[a] + size[b] * apart[b]) / (size[a] + size[b])
        apart[a] = apart[:, a] = joined
        apart[a, a] = np.inf
        apart[b] = apart[:, b] = np.inf  # row b is retired: a stands for both
        size[a] += size[b]
        joins.append(Join(cluster[a], cluster[b], height, int(size[a])))
        cluster[a] = len(apart) + len(joins) - 1
    return tuple(joins)


def leaf_order(joins: Sequence[Join]) -> list[int]:
    """The leaves in an order in which no two branches of the tree cross."""
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


def dataset_tree(split: SplitManifest) -> tuple[Join, ...]:
    """Joins the datasets on max(0, 1 - cosine); a cosine that is not resolved counts as 0."""
    return average_linkage(
        [[max(0.0, 1.0 - (cosine or 0.0)) for cosine in row] for row in split.similarity]
    )


def tree_order(split: SplitManifest) -> list[int]:
    """The datasets in the order of the tree's leaves."""
    return leaf_order(dataset_tree(split))


def group_order(split: SplitManifest) -> list[int]:
    """The datasets by group, those of all groups last, and inside a group in the tree's order."""
    rows = split.datasets
    return sorted(tree_order(split), key=lambda i: (rows[i].group < 0, rows[i].group))
