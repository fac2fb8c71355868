"""Advises whether to split a mixture, from split.json only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from merit_fast.manifests.schemas import SplitManifest
from merit_fast.report.summary import exceeds_null
from merit_fast.report.tables import percent


@dataclass(frozen=True)
class Advice:
    """An answer in one sentence, with its reasons and the commands that come next."""

    advice: Literal["split", "do not split", "measure more"]
    sentence: str
    groups: int
    reasons: tuple[str, ...]
    next: tuple[str, ...]


def advise(split: SplitManifest, steps: Sequence[int] | None = None) -> Advice:
    """Answers whether the split promises more than joint training.

    Args:
        split: the split and its figures.
        steps: optimizer steps [K] of each group's branch, if they are known.
    """
    unresolved = sum(row.more_examples > 0 for row in split.datasets)
    number = len(split.datasets)
    reasons = [f"The gradient of {number - unresolved} of {number} datasets exceeds its noise."]
    reasons.append(
        f"{percent(split.certain_negative_fraction)} of the resolved pairs surely conflict."
    )
    if steps:
        reasons.append(f"The shortest branch has {min(steps):,} optimizer steps.")
    if 2 * unresolved > number:
        more = max(row.more_examples for row in split.datasets)
        sentence = f"Measure more: about {more:,} more examples of a dataset would resolve it."
        return Advice("measure more", sentence, split.groups, tuple(reasons), ())
    if split.certain_negative_fraction == 0 or not exceeds_null(split):
        sentence = "Do not split: the datasets do not conflict more than chance explains."
        return Advice("do not split", sentence, split.groups, tuple(reasons), ())
    sentence = f"Split into {split.groups} groups: the datasets conflict along these groups."
    return Advice("split", sentence, split.groups, tuple(reasons), ())
