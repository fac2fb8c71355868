"""Compares arms item by item: the same rows, windows and prompts measure every model.

A difference of two arms has two errors. Its error over items comes from the paired differences of
the items, in strata of one dataset each: with values v (nats, say) and sizes s (target tokens) of
the n items of a stratum, D = sum(v) / sum(s) is a ratio, e = v - D s are its residuals, and

    SE^2 = 1 / S^2 sum over the S strata of  n / (n - 1) sum(e^2) / sum(s)^2

Its error over seeds is the standard error of the differences of the models of equal seed.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from merit_fast.evaluate.items import ItemScores, Measured, measured
from merit_fast.evaluate.models import BASE
from merit_fast.manifests.schemas import Comparison

MEASURES = ("loss", "exact_match", "text_loss", "chat_nll")
_HIGHER_IS_BETTER = ("exact_match",)
_OF_TRAINED_ARMS = ("text_loss", "chat_nll")  # retention: the base itself is no candidate


def compare_arms(
    arms: Mapping[str, Sequence[ItemScores]], rows_of_datasets: tuple[int, ...]
) -> tuple[Comparison, ...]:
    """Compares ``merit`` with every other arm and, for each measure, the best arm with the second.

    Args:
        arms: arm -> scores of its models, one for each seed.
        rows_of_datasets: number of rows of each dataset.
    """
    pairs = [
        (measure, "merit", other)
        for measure in MEASURES
        for other in arms
        if "merit" in arms and other != "merit"
    ]
    for measure in MEASURES:
        ranked = rank(arms, measure, rows_of_datasets)
        if len(ranked) > 1 and (measure, ranked[0], ranked[1]) not in pairs:
            pairs.append((measure, ranked[0], ranked[1]))
    return tuple(
        compare(measure, (a, arms[a]), (b, arms[b]), rows_of_datasets) for measure, a, b in pairs
    )


def rank(
    arms: Mapping[str, Sequence[ItemScores]], measure: str, rows_of_datasets: tuple[int, ...]
) -> list[str]:
    """The arms from the best to the worst; ties keep their order. Retention leaves out the base."""
    means = {
        arm: float(np.mean([measured(one, measure, rows_of_datasets).mean for one in models]))
        for arm, models in arms.items()
        if not (arm == BASE and measure in _OF_TRAINED_ARMS)
    }
    sign = -1.0 if measure in _HIGHER_IS_BETTER else 1.0
    return sorted(means, key=lambda arm: sign * means[arm])


def compare(
    measure: str,
    first: tuple[str, Sequence[ItemScores]],
    second: tuple[str, Sequence[ItemScores]],
    rows_of_datasets: tuple[int, ...],
) -> Comparison:
    """First minus second on one measure, each given by its name and its models' scores.

    Raises:
        ValueError: the two were measured on different items.
    """
    (a, first_models), (b, second_models) = first, second
    firsts = [measured(one, measure, rows_of_datasets) for one in first_models]
    seconds = [measured(one, measure, rows_of_datasets) for one in second_models]
    sizes = firsts[0].sizes
    if any(not np.array_equal(one.sizes, sizes) for one in (*firsts, *seconds)):
        raise ValueError(f"compare: {a} and {b} were measured on different items")
    values = np.mean([m.values for m in firsts], axis=0) - np.mean(
        [m.values for m in seconds], axis=0
    )
    difference = Measured(values, sizes, firsts[0].strata)
    by_seed = _differences_by_seed(firsts, seconds, (a, b))
    return Comparison(
        first=a,
        second=b,
        measure=measure,
        difference=difference.mean,
        item_error=item_error(difference),
        seed_error=None if by_seed is None else standard_error(by_seed),
        num_items=len(values),
        num_seeds=min(len(models) for name, models in (first, second) if name != BASE),
    )


def item_error(difference: Measured) -> float | None:
    """Standard error of the difference over items; None where a stratum has one item only."""
    variance = 0.0
    for values, sizes in difference.split():
        n = len(values)
        if n < 2:
            return None
        residuals = values - values.sum() / sizes.sum() * sizes
        variance += n / (n - 1) * float(residuals @ residuals) / float(sizes.sum()) ** 2
    return float(variance**0.5) / len(difference.strata)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for one value."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def _differences_by_seed(
    firsts: Sequence[Measured], seconds: Sequence[Measured], names: tuple[str, str]
) -> list[float] | None:
    """Differences of the models of equal seed; the base has no seed. None: the seeds differ."""
    a = [one.mean for one in firsts] * (len(seconds) if names[0] == BASE else 1)
    b = [one.mean for one in seconds] * (len(firsts) if names[1] == BASE else 1)
    if len(a) != len(b):
        return None
    return [x - y for x, y in zip(a, b, strict=True)]
