"""Mixtures, splits and merges of them for tests."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merit_fast.split.conflict import conflict_of
from merit_fast.split.moments import block_products
from merit_fast.split.search.methods import METHODS, Method
from merit_fast.split.search.objective import double_center
from merit_fast.split.search.partition import Partition, partition_datasets

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
NAMES = [f"d{i:02}" for i in range(40)]


def mixture(
    seed: int, number: int, *, spread: float = 0.4, dimensions: int = 3
) -> tuple[Floats, Floats]:
    """Centred inner products and weights of datasets with one strong conflict axis."""
    generator = np.random.default_rng(seed)
    z = generator.standard_normal((number, dimensions))
    z += 2 * generator.standard_normal((number, 1)) * generator.standard_normal(dimensions)
    weights = np.exp(spread * generator.standard_normal(number))
    weights /= weights.sum()
    return double_center(z @ z.T, weights), weights


def split(
    similarity: Floats,
    weights: Floats,
    num_groups: int,
    method: Method = "pca-swap",
    **options: Any,
) -> Partition:
    """Splits by any method, with the extra inputs that the method needs."""
    names = NAMES[: len(weights)]
    if METHODS[method].needs_texts:
        options["text_similarity"] = similarity
    if METHODS[method].needs_manual:
        options["manual"] = [names[k::num_groups] for k in range(num_groups)]
    return partition_datasets(similarity, weights, names, num_groups, method, **options)


def split_blocks(
    sums: Sequence[Any],
    counts: NDArray[Any],
    names: Sequence[str],
    method: Method = "pca-swap",
    num_groups: int = 2,
) -> Integers:
    """Labels of the split that the split stage makes of block sums, all datasets of one weight."""
    weights = np.full(len(names), 1 / len(names))
    similarity = conflict_of(block_products(sums, counts), debias="blocks").similarity
    centered = double_center(similarity, weights)
    partition = partition_datasets(
        centered, weights, names, num_groups, method, uncentered=similarity
    )
    return np.array(partition.labels)


def balanced_halves(count: int) -> list[Integers]:
    """All splits of ``count`` datasets into two groups of equal size."""
    return [
        np.isin(np.arange(count), chosen).astype(int)
        for chosen in itertools.combinations(range(count), count // 2)
    ]


def merge_vectors(positions: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """Merges flat float64 models by the package's own merge."""
    import torch

    from merit_fast.merge import merge_state_dicts

    states = [{"w": torch.from_numpy(position)} for position in positions]
    return merge_state_dicts(states, weights=[float(w) for w in weights])["w"].numpy()
