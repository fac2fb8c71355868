"""Splits of one mixture under one config, of all or some examples, into any number of groups."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from merit_fast.progress import Task
from merit_fast.split.config import SplitConfig
from merit_fast.split.conflict import conflict_of, left_out_similarities
from merit_fast.split.moments import BlockProducts
from merit_fast.split.noise import NoiseScales, noise_scales
from merit_fast.split.parting import HeldOutBlocks, Parting
from merit_fast.split.search.methods import METHODS
from merit_fast.split.search.objective import center_columns, double_center
from merit_fast.split.search.partition import Partition, partition_datasets
from merit_fast.split.search.space import OtherSplits, other_splits
from merit_fast.split.separation import (
    Separation,
    measure_separation,
    resolved_spread,
    share_between,
)

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]

_NULL_SPLITS = 200


@dataclass(frozen=True)
class Mixture:
    """N datasets as a split knows them, their gradients aside.

    Attributes:
        names: [N], distinct.
        tokens, samples: [N] of training.
        steps: optimizer steps of a joint run on all of it.
        text_similarity: [N, N] for method text-cluster.
        square_norms, square_weights: [N, G] sums of |w g|^2 and w^2 of the examples per block, for
            noise scales.
    """

    names: Sequence[str]
    tokens: Array
    samples: Array
    steps: int
    text_similarity: Array | None = None
    square_norms: Array | None = None
    square_weights: Array | None = None


class Splitter:
    """Splits of one mixture under one config: any number of groups, all or some examples."""

    def __init__(
        self, products: BlockProducts, mixture: Mixture, config: SplitConfig, task: Task
    ) -> None:
        self.task = task
        self.products = products
        self.mixture = mixture
        self.config = config
        self.choices = config.filled()
        self.method = METHODS[self.choices.method]
        counted = mixture.samples if self.choices.balance == "samples" else mixture.tokens
        self.weights = np.asarray(counted / counted.sum())
        self.tokens = np.asarray(mixture.tokens / mixture.tokens.sum())
        self.tolerance = math.inf if self.choices.balance == "none" else config.tolerance
        self.conflict = conflict_of(
            products, similarity=config.similarity, debias=self.choices.debias
        )

    def split(
        self, similarity: Array, num_groups: int, tolerance: float | None = None
    ) -> Partition:
        """Splits by the config's method, on a similarity matrix [N, N] that is not centred.

        A ``tolerance`` replaces the config's.
        """
        config = self.config
        partition = partition_datasets(
            self.centered(similarity),
            self.weights,
            self.mixture.names,
            num_groups,
            self.method.name,
            tolerance=self.tolerance if tolerance is None else tolerance,
            pins=config.pins,
            spread=config.spread,
            manual=config.manual or None,
            uncentered=similarity,
            text_similarity=self.mixture.text_similarity,
            seed=config.seed,
        )
        self.task.advance(1)
        return partition

    @functools.cached_property
    def folds(self) -> list[Array]:
        """[G] similarity with block g of every dataset left out."""
        return left_out_similarities(self.products, self.config.similarity, self.choices.debias)

    @functools.cached_property
    def blocks(self) -> HeldOutBlocks:
        return HeldOutBlocks(self.products, self.weights)

    @property
    def differs(self) -> bool:
        """Whether the datasets differ by more than the noise of their gradients."""
        return resolved_spread(self.products, self.weights, self.config.similarity) > 0

    def labels(self, num_groups: int) -> Labels:
        if num_groups == 1:
            return np.zeros(len(self.weights), np.intp)
        return np.array(self.partition(num_groups).labels, np.intp)

    @functools.cache  # noqa: B019
    def held_out(self, num_groups: int) -> Labels:
        """[G, N] groups of the splits chosen without block g."""
        if num_groups == 1:
            return np.zeros(self.products.left_out.shape[:2], np.intp)
        return np.array([self.split(fold, num_groups).labels for fold in self.folds], np.intp)

    def contrast(self, coarse: Labels, fine: Labels) -> Parting:
        return self.blocks.contrast(coarse, fine)

    @functools.cache  # noqa: B019 - one splitter lives as long as its decision
    def partition(self, num_groups: int) -> Partition:
        """The split of all examples."""
        return self.split(self.conflict.similarity, num_groups)

    def centered(self, similarity: Array) -> Array:
        """Gram of the points to split: token-weighted deviations, or column-centred rows."""
        if self.choices.center == "tokens":
            return double_center(similarity, self.weights)
        rows = center_columns(similarity)
        return np.asarray(rows @ rows.T)

    def separation(self, num_groups: int) -> Separation:
        """Measures the split in ``num_groups``, cross-validated, against other splits."""
        others = self.others(num_groups)
        measured = measure_separation(
            self.products,
            self.weights,
            self.partition(num_groups).labels,
            lambda matrix: self.split(matrix, num_groups).labels,
            others.labels,
            similarity=self.config.similarity,
            debias=self.choices.debias,
        )
        return replace(measured, num_splits=with_this(others.number))

    @functools.cache  # noqa: B019
    def others(self, num_groups: int) -> OtherSplits:
        """Up to 200 admissible splits other than the method's own, under the config's pins."""
        return other_splits(
            self.partition(num_groups).labels,
            self.weights,
            self.mixture.names,
            num_groups,
            _NULL_SPLITS,
            tolerance=self.tolerance,
            pins=self.config.pins,
            spread=self.config.spread,
            seed=self.config.seed,
        )

    def unbalanced(self, num_groups: int) -> tuple[tuple[int, ...], float]:
        """Labels and eta squared of the split found without a balance; empty if that is none."""
        if num_groups == 1 or math.isinf(self.tolerance or 0.0) or not self.method.seeks_balance:
            return (), math.nan
        labels = self.split(self.conflict.similarity, num_groups, math.inf).labels
        eta = share_between(self.products, self.weights, labels, self.config.similarity)
        return labels, eta

    def smallest_share(self, num_groups: int) -> float:
        """Share of all tokens in the smallest group of the split in ``num_groups``."""
        labels = np.asarray(self.partition(num_groups).labels)
        share = self.tokens
        spread = share[labels < 0].sum() / num_groups
        return float(min(share[labels == label].sum() + spread for label in range(num_groups)))

    def noise(self) -> NoiseScales | None:
        square_norms = self.mixture.square_norms
        if square_norms is None:
            return None
        return noise_scales(
            self.products,
            square_norms,
            self.tokens,
            self.conflict.resolved,
            self.mixture.square_weights,
        )

    def stability(self, num_groups: int, labels: Sequence[int]) -> Array:
        """[N] 1 - the mean share of datasets whose company changes with a block left out."""
        together = np.equal.outer(labels, labels)
        changed = np.zeros(len(labels))
        for again in self.held_out(num_groups):
            changed += (np.equal.outer(again, again) != together).mean(1)
        return np.asarray(1 - changed / len(self.folds))


def with_this(others: int | None) -> int | None:
    return None if others is None else others + 1
