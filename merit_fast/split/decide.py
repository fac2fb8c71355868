"""From the products of block sums to a decision: how many groups, which, and how sure that is. Pure NumPy, no files."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merit_fast.split.auto import Choice, candidate_groups, choose_groups
from merit_fast.split.config import SplitConfig
from merit_fast.split.conflict import (
    Conflict,
    center_matrix,
    conflict_of,
    double_center,
    left_out_similarities,
)
from merit_fast.split.moments import BlockProducts
from merit_fast.split.search.medians import Axes, conflict_axes, weighted_axes
from merit_fast.split.search.partition import Partition, partition, random_groups
from merit_fast.split.search.problem import Pins
from merit_fast.split.separation import Separation, separation

Array = npt.NDArray[np.float64]

_NULL_SPLITS = 200


@dataclass(frozen=True)
class Mixture:
    """What a split knows of N datasets beside their gradients.

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
        groups: K.
        reason: of an automatic K; "" where it was asked for.
        separations: K -> how its split separates, of every K tried, the chosen one among them (not for K = 1).
        scores: [N, R] on the principal axes of the centred similarity, R = 2 or log2 K if that is more.
        score_errors: [N, R] block-jackknife standard errors.
        explained_variance: [R].
        stability: [N] how much of a dataset's company it keeps when a block of examples is left out, in [0, 1].
        random: [N] labels of a balanced random split: the control.
    """

    groups: int
    reason: str
    conflict: Conflict
    partition: Partition
    separations: dict[int, Separation]
    scores: Array
    score_errors: Array
    explained_variance: Array
    stability: Array
    random: tuple[int, ...]


class Splitter:
    """One mixture's products under one config: splits of any K, of all examples or of some."""

    def __init__(self, products: BlockProducts, mixture: Mixture, config: SplitConfig) -> None:
        self.products, self.mixture, self.config = products, mixture, config
        self.choices = config.filled()
        counted = mixture.samples if self.choices.balance == "samples" else mixture.tokens
        self.weights = np.asarray(counted / counted.sum())
        self.tolerance = math.inf if self.choices.balance == "none" else config.tolerance
        self.conflict = conflict_of(
            products, similarity=config.similarity, debias=self.choices.debias
        )

    def split(self, similarity: Array, groups: int) -> Partition:
        """By the config's method, on a similarity matrix [N, N] that is not centred."""
        config = self.config
        return partition(
            self.centered(similarity),
            self.weights,
            self.mixture.names,
            groups,
            self.choices.method,
            tolerance=self.tolerance,
            pins=config.pins,
            spread=config.spread,
            manual=config.manual or None,
            uncentered=similarity,
            text_similarity=self.mixture.text_similarity,
            seed=config.seed,
        )

    def centered(self, similarity: Array) -> Array:
        """The Gram of the points that are split: token-weighted deviations, or the matrix's column-centred rows."""
        if self.choices.center == "tokens":
            return double_center(similarity, self.weights)
        rows = center_matrix(similarity, self.weights, "columns")
        return np.asarray(rows @ rows.T)

    def separation(self, groups: int) -> Separation:
        """How the split in ``groups`` separates, cross-validated, against random splits."""
        drawn = iter(self.random(groups, 2 * _NULL_SPLITS, self.config.pins))
        return separation(
            self.products,
            self.weights,
            self.split(self.conflict.similarity, groups).groups,
            lambda matrix: self.split(matrix, groups).groups,
            lambda: next(drawn),
            similarity=self.config.similarity,
            debias=self.choices.debias,
            draws=_NULL_SPLITS,
        )

    def random(self, groups: int, count: int, pins: Pins | None = None) -> npt.NDArray[np.intp]:
        """[count, N] random splits of the same balance."""
        seed, names = self.config.seed, self.mixture.names
        return random_groups(
            self.weights, names, groups, count, tolerance=self.tolerance, pins=pins, seed=seed
        )

    def smallest_share(self, groups: int) -> float:
        """Of the tokens, in the smallest group of the split in ``groups``."""
        labels = np.asarray(self.split(self.conflict.similarity, groups).groups)
        share = self.mixture.tokens / self.mixture.tokens.sum()
        spread = share[labels < 0].sum() / groups
        return float(min(share[labels == group].sum() + spread for group in range(groups)))

    def stability(self, groups: int, labels: Sequence[int]) -> Array:
        """[N] 1 - the mean share of datasets whose company changes with a block left out."""
        together = np.equal.outer(labels, labels)
        changed = np.zeros(len(labels))
        folds = left_out_similarities(self.products, self.config.similarity, self.choices.debias)
        for similarity in folds:
            again = self.split(similarity, groups).groups
            changed += (np.equal.outer(again, again) != together).mean(1)
        return np.asarray(1 - changed / len(folds))


def decide(products: BlockProducts, mixture: Mixture, config: SplitConfig) -> Decision:
    """Splits a mixture as ``config`` says.

    Raises:
        InputError: what is asked for contradicts itself or cannot be had with so many datasets.
    """
    splitter = Splitter(products, mixture, config)
    choice = _choose(splitter)
    groups = choice.groups
    found = splitter.split(splitter.conflict.similarity, groups)
    control = splitter.random(groups, 1)  # without pins: what chance would do
    scores, errors, variance = _axes(splitter, max(2, math.ceil(math.log2(groups))))
    return Decision(
        groups=groups,
        reason=choice.reason,
        conflict=splitter.conflict,
        partition=found,
        separations=choice.separations,
        scores=scores,
        score_errors=errors,
        explained_variance=variance,
        stability=splitter.stability(groups, found.groups),
        random=tuple(int(label) for label in control[0]),
    )


def _choose(splitter: Splitter) -> Choice:
    config, number = splitter.config, len(splitter.mixture.names)
    if config.groups == "auto":

        @functools.cache
        def measure(groups: int) -> tuple[Separation, float]:
            return splitter.separation(groups), splitter.smallest_share(groups)

        return choose_groups(
            candidate_groups(number), measure, splitter.mixture.steps, config.min_steps
        )
    measurable = splitter.choices.method not in (
        "iid",
        "manual",
        "text-cluster",
    )  # those look at no gradient
    others = candidate_groups(number) if measurable and not config.pins.group else []
    tried = sorted({*others, config.groups} - {1})
    return Choice(config.groups, "", {groups: splitter.separation(groups) for groups in tried})


def _axes(splitter: Splitter, count: int) -> tuple[Array, Array, Array]:
    """Scores [N, R], their errors and the axes' shares of the variance."""
    config, choices = splitter.config, splitter.choices

    def axes(similarity: Array) -> Axes:
        if choices.method == "pca-median":
            return conflict_axes(similarity, count)
        weights = splitter.weights
        return weighted_axes(
            splitter.centered(similarity) * np.outer(weights, weights), weights, count
        )

    found = axes(splitter.conflict.similarity)
    folds = []
    for similarity in left_out_similarities(splitter.products, config.similarity, choices.debias):
        again = axes(similarity).scores
        folds.append(again @ _turn(again, found.scores))
    deviation = np.stack(folds) - np.mean(folds, 0)
    errors = np.sqrt((len(folds) - 1) / len(folds) * (deviation**2).sum(0))
    return found.scores, errors, found.explained_variance


def _turn(scores: Array, onto: Array) -> Array:
    """The rotation that brings ``scores`` nearest to ``onto`` (Schoenemann 1966): axes have no sign and may swap."""
    u, _, v = np.linalg.svd(scores.T @ onto)
    return np.asarray(u @ v)
