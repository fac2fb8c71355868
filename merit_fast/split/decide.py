"""The decision on one mixture: how many groups, which, and how sure. Pure NumPy, no files."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merit_fast.progress import Progress, SilentProgress
from merit_fast.split.auto import (
    Choice,
    Tried,
    candidate_numbers,
    choose_num_groups,
    measure_parting,
)
from merit_fast.split.config import SplitConfig
from merit_fast.split.conflict import (
    Conflict,
)
from merit_fast.split.mixing import suggested_shares
from merit_fast.split.moments import BlockProducts
from merit_fast.split.noise import NoiseScales
from merit_fast.split.search.medians import Axes, conflict_axes, weighted_axes
from merit_fast.split.search.methods import METHODS
from merit_fast.split.search.partition import Partition
from merit_fast.split.separation import Separation
from merit_fast.split.splitter import Mixture, Splitter, with_this

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Decision:
    """A split of N datasets in K groups.

    Attributes:
        num_groups: K.
        reason: reason for an automatic K; "" where the user asked for it.
        separation: of the split; None for K = 1.
        tried: contrasts on held-out blocks of every K tried, the chosen one among them (not for
            K = 1).
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
        noise: gradient noise scales; None without square norms.
        shares, share_errors: [N] suggested mixture weights and their standard errors.
    """

    num_groups: int
    reason: str
    conflict: Conflict
    partition: Partition
    separation: Separation | None
    tried: tuple[Tried, ...]
    scores: Array
    score_errors: Array
    explained_variance: Array
    stability: Array
    controls: tuple[tuple[int, ...], ...]
    num_splits: int | None
    unbalanced: tuple[int, ...]
    unbalanced_eta: float
    noise: NoiseScales | None
    shares: Array
    share_errors: Array


def decide_split(
    products: BlockProducts,
    mixture: Mixture,
    config: SplitConfig,
    num_controls: int = 1,
    progress: Progress | None = None,
) -> Decision:
    """Splits a mixture as ``config`` asks.

    Args:
        products: products of the datasets' block sums.
        mixture: the datasets.
        config: options.
        num_controls: number of random splits to compare with, at most 200; fewer are drawn where
            fewer exist.
        progress: display that counts the searches.

    Raises:
        InputError: an option contradicts another one or cannot hold for so many datasets.
    """
    shown = progress or SilentProgress()
    with shown.task("split", _num_searches(products, mixture, config), "searches") as task:
        return _decide(Splitter(products, mixture, config, task), num_controls)


def _num_searches(products: BlockProducts, mixture: Mixture, config: SplitConfig) -> int:
    """Returns the largest number of searches that a decision takes."""
    blocks = int(products.counts.shape[1])
    numbers = [config.groups] if config.groups != "auto" else _candidates(mixture, config)
    return len(numbers) * (blocks + 1) + 3  # of both halves, and without a balance


def _decide(splitter: Splitter, num_controls: int) -> Decision:
    products = splitter.products
    choice = _choose(splitter)
    num_groups = choice.num_groups
    partition = splitter.partition(num_groups)
    others = splitter.others(num_groups)
    unbalanced, unbalanced_eta = splitter.unbalanced(num_groups)
    shares, share_errors = suggested_shares(products, splitter.tokens, splitter.conflict.resolved)
    scores, errors, variance = _scores(splitter, max(2, math.ceil(math.log2(num_groups))))
    return Decision(
        num_groups=num_groups,
        reason=choice.reason,
        conflict=splitter.conflict,
        partition=partition,
        separation=splitter.separation(num_groups) if num_groups > 1 else None,
        tried=choice.tried,
        scores=scores,
        score_errors=errors,
        explained_variance=variance,
        stability=splitter.stability(num_groups, partition.labels),
        controls=tuple(tuple(map(int, row)) for row in others.labels[:num_controls]),
        num_splits=with_this(others.number),
        unbalanced=unbalanced,
        unbalanced_eta=unbalanced_eta,
        noise=splitter.noise(),
        shares=shares,
        share_errors=share_errors,
    )


def _choose(splitter: Splitter) -> Choice:
    config = splitter.config
    if config.groups != "auto":
        if config.groups == 1:
            return Choice(1, "", ())
        return Choice(
            config.groups, "", (measure_parting(config.groups, 1, splitter, splitter.conflict),)
        )
    mixture = splitter.mixture
    candidates = _candidates(mixture, config)
    return choose_num_groups(
        candidates, splitter, splitter.conflict, mixture.steps, config.min_steps
    )


def _candidates(mixture: Mixture, config: SplitConfig) -> list[int]:
    """Numbers of groups for ``groups: auto``, but for those whose branches would be too short."""
    numbers = candidate_numbers(
        mixture.names,
        config.pins,
        config.spread,
        powers_of_two=METHODS[config.filled().method].power_of_two,
    )
    longest = mixture.steps / config.min_steps
    return [number for number in numbers if number <= longest] or numbers[:1]


def _scores(splitter: Splitter, count: int) -> tuple[Array, Array, Array]:
    """Scores [N, R], their errors and the axes' shares of the variance."""

    def axes_of(similarity: Array) -> Axes:
        if splitter.method.column_axes:
            return conflict_axes(similarity, count)
        weights = splitter.weights
        products = splitter.centered(similarity) * np.outer(weights, weights)
        return weighted_axes(products, weights, count)

    axes = axes_of(splitter.conflict.similarity)
    folds = []
    for similarity in splitter.folds:
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
