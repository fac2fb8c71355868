"""Mixtures and splits of them for tests."""

import numpy as np

from merit_fast.split.conflict import double_center
from merit_fast.split.search.methods import METHODS
from merit_fast.split.search.partition import partition_datasets

NAMES = [f"d{i:02}" for i in range(40)]


def mixture(seed, number, *, spread=0.4, dimensions=3):
    """Centred inner products and weights of datasets with one strong conflict axis."""
    generator = np.random.default_rng(seed)
    z = generator.standard_normal((number, dimensions))
    z += 2 * generator.standard_normal((number, 1)) * generator.standard_normal(dimensions)
    weights = np.exp(spread * generator.standard_normal(number))
    weights /= weights.sum()
    return double_center(z @ z.T, weights), weights


def split(similarity, weights, num_groups, method="pca-swap", **options):
    """Splits by any method, with the extra inputs that the method needs."""
    names = NAMES[: len(weights)]
    if METHODS[method].needs_texts:
        options["text_similarity"] = similarity
    if METHODS[method].needs_manual:
        options["manual"] = [names[k::num_groups] for k in range(num_groups)]
    return partition_datasets(similarity, weights, names, num_groups, method, **options)
