"""Mixtures whose true cosines are known, and the number of groups that ``groups: auto`` chooses."""

import numpy as np
from numpy.typing import NDArray
from support.split.block_sums import sample

from merit_fast.split import SplitConfig
from merit_fast.split.decide import Decision, decide_split
from merit_fast.split.moments import block_products
from merit_fast.split.splitter import Mixture

Floats = NDArray[np.float64]


def clusters(sizes: tuple[int, ...], within: float, across: float) -> Floats:
    """[N, N] cosines of datasets in clusters."""
    label = np.repeat(np.arange(len(sizes)), sizes)
    cosine = np.where(label[:, None] == label, within, across)
    np.fill_diagonal(cosine, 1.0)
    return cosine


def means_of(cosine: Floats, generator: np.random.Generator, width: int = 300) -> Floats:
    """[N, width] unit vectors with these cosines, in random directions."""
    values, vectors = np.linalg.eigh(cosine)
    assert values.min() > -1e-9, "no vectors have these cosines"
    basis = np.linalg.qr(generator.standard_normal((width, len(cosine))))[0].T
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)) @ basis)


def choose(
    means: Floats,
    examples: int,
    noise: float,
    generator: np.random.Generator,
    spread: float = 0.0,
    config: SplitConfig | None = None,
) -> Decision:
    """The decision of ``groups: auto`` on ``examples`` gradients per dataset.

    ``spread`` is the standard deviation of the logarithms of the token counts.
    """
    number = len(means)
    tokens = np.exp(spread * generator.standard_normal(number)) * 1e5
    mixture = Mixture([f"d{i:02}" for i in range(number)], tokens, tokens / 50, 100_000)
    products = block_products(*sample(means, examples, noise, generator))
    return decide_split(products, mixture, config or SplitConfig(groups="auto"))
