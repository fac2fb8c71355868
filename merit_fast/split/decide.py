"""The decision on one mixture: how many groups, which, and how sure. Pure NumPy, no files."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from merit_fast.split.auto import Choice, candidate_numbers, choose_num_groups
from merit_fast.split.config import SplitConfig
from merit_fast.split.conflict import (
    Conflict,
    center_columns,
    conflict_of,
    double_center,
    left_out_similarities,
)
from merit_fast.split.moments import BlockProducts
from merit_fast.split.search.medians import Axes, conflict_axes, weighted_axes
from merit_fast.split.search.methods import METHODS
from merit_fast.split.search.partition import Partition, partition_datasets
from merit_fast.split.search.space import OtherSplits, other_splits
from merit_fast.split.separation import Separation, measure_separation, share_between

Array = npt.NDArray[np.float64]

_NULL_SPLITS = 200


@dataclass(frozen=True)
class Mixture:
    """N datasets as a split knows them, their gradients aside.

    Attributes:
        names: [N], distinct.
        tokens, samples: [N] of training.
        steps: optimizer steps of a joint run on all of it.
        text_similarity: [N, N] for method text-cluster.
    """

    names: Sequence[str]
    tokens: Array
    samples: Array
    steps: int
    text_similarity: Array | None = None


@dataclass(frozen=True)
class Decision:
    """A split of N datasets in K groups.

    Attributes:
        num_groups: K.
        reason: reason for an automatic K; "" where the user asked for it.
        separations: K -> separation of its split, of every K tried, the chosen one among them (not
            for K = 1).
        scores: [N, R] on the principal axes of the centred similarity, R = 2 or log2 K if that is
            more.
        score_errors: [N, R] block-jackknife standard errors.
        explained_variance: [R].
        stability: [N] share of a dataset's company that it keeps when a block of examples is left
            out, in [0, 1].
        controls: [C, N] labels of distinct random splits as balanced as this one, none of them
            this one.
        num_splits: how many such splits exist, this one included; None: too many to count.
        unbalanced: [N] labels of the split that the same search finds without a balance; empty
            where the balance does not take part in the search.
        unbalanced_eta: eta squared of that split; NaN where unknown.
    """

    num_groups: int
    reason: str
    conflict: Conflict
    partition: Partition
    separations: dict[int, Separation]
    scores: Array
    score_errors: Array
    explained_variance: Array
    stability: Array
    controls: tuple[tuple[int, ...], ...]
    num_splits: int | None
    unbalanced: tuple[int, ...]
    unbalanced_eta: float


class Splitter:
    """Splits of one mixture under one config: any number of groups, all or some examples."""

    def __init__(self, products: BlockProducts, mixture: Mixture, config: SplitConfig) -> None:
        self.products = products
        self.mixture = mixture
        self.config = config
        self.choices = config.filled()
        self.method = METHODS[self.choices.method]
        counted = mixture.samples if self.choices.balance == "samples" else mixture.tokens
        self.weights = np.asarray(counted / counted.sum())
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
        return partition_datasets(
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
        return replace(measured, num_splits=_with_this(others.number))

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
        share = self.mixture.tokens / self.mixture.tokens.sum()
        spread = share[labels < 0].sum() / num_groups
        return float(min(share[labels == label].sum() + spread for label in range(num_groups)))

    def stability(self, num_groups: int, labels: Sequence[int]) -> Array:
        """[N] 1 - the mean share of datasets whose company changes with a block left out."""
        together = np.equal.outer(labels, labels)
        changed = np.zeros(len(labels))
        folds = left_out_similarities(self.products, self.config.similarity, self.choices.debias)
        for similarity in folds:
            again = self.split(similarity, num_groups).labels
            changed += (np.equal.outer(again, again) != together).mean(1)
        return np.asarray(1 - changed / len(folds))


def decide_split(
    products: BlockProducts, mixture: Mixture, config: SplitConfig, num_controls: int = 1
) -> Decision:
    """Splits a mixture as ``config`` asks.

    Args:
        products: products of the datasets' block sums.
        mixture: the datasets.
        config: options.
        num_controls: number of random splits to compare with, at most 200; fewer are drawn where
            fewer exist.

    Raises:
        InputError: an option contradicts another one or cannot hold for so many datasets.
    """
    splitter = Splitter(products, mixture, config)
    choice = _choose(splitter)
    num_groups = choice.num_groups
    partition = splitter.partition(num_groups)
    others = splitter.others(num_groups)
    unbalanced, unbalanced_eta = splitter.unbalanced(num_groups)
    scores, errors, variance = _scores(splitter, max(2, math.ceil(math.log2(num_groups))))
    return Decision(
        num_groups=num_groups,
        reason=choice.reason,
        conflict=splitter.conflict,
        partition=partition,
        separations=choice.separations,
        scores=scores,
        score_errors=errors,
        explained_variance=variance,
        stability=splitter.stability(num_groups, partition.labels),
        controls=tuple(tuple(map(int, row)) for row in others.labels[:num_controls]),
        num_splits=_with_this(others.number),
        unbalanced=unbalanced,
        unbalanced_eta=unbalanced_eta,
    )


def _with_this(others: int | None) -> int | None:
    return None if others is None else others + 1


def _choose(splitter: Splitter) -> Choice:
    config = splitter.config
    candidates = candidate_numbers(len(splitter.mixture.names))
    if config.groups == "auto":

        @functools.cache
        def measure(num_groups: int) -> tuple[Separation, float]:
            return splitter.separation(num_groups), splitter.smallest_share(num_groups)

        return choose_num_groups(candidates, measure, splitter.mixture.steps, config.min_steps)
    others = candidates if splitter.method.reads_gradients and not config.pins.group else []
    tried = sorted({*others, config.groups} - {1})
    return Choice(config.groups, "", {number: splitter.separation(number) for number in tried})


def _scores(splitter: Splitter, count: int) -> tuple[Array, Array, Array]:
    """Scores [N, R], their errors and the axes' shares of the variance."""
    config = splitter.config

    def axes_of(similarity: Array) -> Axes:
        if splitter.method.column_axes:
            return conflict_axes(similarity, count)
        weights = splitter.weights
        products = splitter.centered(similarity) * np.outer(weights, weights)
        return weighted_axes(products, weights, count)

    axes = axes_of(splitter.conflict.similarity)
    folds = []
    for similarity in left_out_similarities(
        splitter.products, config.similarity, splitter.choices.debias
    ):
        scores = axes_of(similarity).scores
        folds.append(scores @ _rotation(scores, axes.scores))
    deviation = np.stack(folds) - np.mean(folds, 0)
    errors = np.sqrt((len(folds) - 1) / len(folds) * (deviation**2).sum(0))
    return axes.scores, errors, axes.explained_variance


def _rotation(scores: Array, target: Array) -> Array:
    """Rotates ``scores`` nearest to ``target`` (Schoenemann 1966).

    Axes have no sign and may swap.
    """
    u, _, v = np.linalg.svd(scores.T @ target)
    return np.asarray(u @ v)
