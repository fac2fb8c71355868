"""Sentences on what an evaluation measured: the best arm, its margin, and how sure that is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from merit_fast.manifests.schemas import ArmResult, Comparison, EvaluateManifest


@dataclass(frozen=True)
class _Measure:
    """One measure in words; a lower value is better."""

    key: str  # a field of ArmResult
    name: str
    opening: str


_MIXTURE = _Measure("loss", "loss", "On the mixture")
_RETENTION = (
    _Measure("text_loss", "text loss", "On general text"),
    _Measure("chat_nll", "chat NLL", "On the base model's own answers"),
)
_CERTAIN = 2.0  # standard errors


def measured_sentences(evaluation: EvaluateManifest) -> tuple[str, ...]:
    """Names the best arm on the mixture, then on retention, with margins and their errors.

    The base takes part on the mixture only: nobody forgets less than the base.
    """
    trained = {arm: result for arm, result in evaluation.arms.items() if arm != "base"}
    sentences = [*_best(evaluation, _MIXTURE, evaluation.arms)]
    if "merit" in trained:
        sentences += _merit(evaluation)
    for measure in _RETENTION:
        sentences += _best(evaluation, measure, trained)
    return (*sentences, _seeds(trained))


def comparison_of(
    evaluation: EvaluateManifest, first: str, second: str, measure: str
) -> Comparison | None:
    """The paired comparison of two arms, turned so that it is first - second; None if absent."""
    for row in evaluation.comparisons:
        if row.measure == measure and (row.first, row.second) == (first, second):
            return row
        if row.measure == measure and (row.first, row.second) == (second, first):
            return replace(row, first=first, second=second, difference=-row.difference)
    return None


def is_certain(row: Comparison) -> bool:
    """Whether the difference exceeds two standard errors, those by row and by seed taken together.

    A difference without any error is not certain.
    """
    errors = [error for error in (row.item_error, row.seed_error) if error is not None]
    return bool(errors) and abs(row.difference) > _CERTAIN * math.hypot(*errors)


def _ranked(results: Mapping[str, ArmResult], measure: _Measure) -> list[tuple[str, float]]:
    values = [(arm, float(getattr(result, measure.key))) for arm, result in results.items()]
    return sorted((pair for pair in values if math.isfinite(pair[1])), key=lambda pair: pair[1])


def _best(
    evaluation: EvaluateManifest, measure: _Measure, results: Mapping[str, ArmResult]
) -> list[str]:
    """One sentence on the best arm and the one that follows it."""
    ranked = _ranked(results, measure)
    if not ranked:
        return [f"{measure.opening}, no arm has a finite {measure.name}."]
    best, value = ranked[0]
    lowest = f"{measure.opening}, {best} has the lowest {measure.name}, {value:.3f}"
    if measure is not _MIXTURE and "base" in evaluation.arms:
        base = getattr(evaluation.arms["base"], measure.key)
        lowest += f" (base {base:.3f})"
    if len(ranked) == 1:
        return [f"{lowest}; no other arm was measured."]
    second, other = ranked[1]
    row = comparison_of(evaluation, best, second, measure.key)
    if row is None:
        return [f"{lowest}; {second} follows with {other:.3f}, a difference without an error bar."]
    if is_certain(row):
        return [f"{lowest}: {_margin(row)} below {second}."]
    return [
        f"{lowest}, but {second} ({other:.3f}) cannot be told from it: "
        f"the difference is {_margin(row)}."
    ]


def _merit(evaluation: EvaluateManifest) -> list[str]:
    """One sentence on merit, unless it is among the first two on the mixture or has no loss."""
    ranked = _ranked(evaluation.arms, _MIXTURE)
    arms = [arm for arm, _ in ranked]
    if "merit" not in arms or "merit" in arms[:2]:
        return []
    place = arms.index("merit")
    row = comparison_of(evaluation, "merit", arms[0], _MIXTURE.key)
    margin = (
        f"{ranked[place][1] - ranked[0][1]:.3f} (without an error bar)"
        if row is None
        else _margin(row)
    )
    loss = f"{ranked[place][1]:.3f}"
    return [f"The loss of merit, {loss}, is number {place + 1}: {margin} above that of {arms[0]}."]


def _margin(row: Comparison) -> str:
    errors = []
    if row.item_error is not None:
        errors.append(f"± {row.item_error:.3f} by row")
    if row.seed_error is not None:
        errors.append(f"± {row.seed_error:.3f} by seed")
    return f"{abs(row.difference):.3f} ({', '.join(errors) or 'without an error bar'})"


def _seeds(results: Mapping[str, ArmResult]) -> str:
    counts = {result.num_seeds for result in results.values()}
    if counts <= {1}:
        return "Every arm was trained once: one seed has no error bar between trainings."
    if len(counts) == 1:
        return f"Every arm was trained with {counts.pop()} seeds; errors by seed are between these."
    trained = ", ".join(f"{arm} {result.num_seeds}" for arm, result in results.items())
    return f"Seeds of training: {trained}; one seed has no error bar between trainings."
