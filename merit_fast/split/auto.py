"""The number of groups: the largest whose split parts conflicts on held-out blocks, or 1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from merit_fast.split.conflict import Conflict
from merit_fast.split.parting import Parting
from merit_fast.split.search.problem import Pins

Labels = npt.NDArray[np.intp]

CHANCE = 0.005  # of a split where nothing conflicts, all numbers of groups together
_FEW_CONFLICTS = 0.05  # share of sure conflicts among the parted pairs that counts as conflict
_MOST_KEPT = 0.5  # share of the kept pairs' agreement that pairs parted further may still have


@dataclass(frozen=True)
class Tried:
    """One number of groups that was tried.

    Attributes:
        num_groups: K.
        coarser: number of groups of the split that it was compared with.
        parting: contrast with that split, on held-out blocks.
        whole: contrast with one group.
        sure_share: share of sure conflicts among the pairs that it parts.
        steps: optimizer steps of the shortest branch.
        taken: whether it qualified.
    """

    num_groups: int
    coarser: int
    parting: Parting
    whole: Parting
    sure_share: float
    steps: float = math.inf
    taken: bool = False


@dataclass(frozen=True)
class Choice:
    """num_groups: K. reason: one sentence. tried: every K that was measured, rising."""

    num_groups: int
    reason: str
    tried: tuple[Tried, ...]


class Splits(Protocol):
    """Splits of one mixture, by their number of groups; 1: all datasets in one group."""

    @property
    def differs(self) -> bool:
        """Whether the datasets differ by more than the noise of their gradients."""

    def labels(self, num_groups: int) -> Labels:
        """[N] groups of the split of all examples."""

    def held_out(self, num_groups: int) -> Labels:
        """[G, N] groups of the splits chosen without block g."""

    def contrast(self, coarse: Labels, fine: Labels) -> Parting:
        """Contrast of two splits [G, N] on block g, which the splits may or may not know."""

    def smallest_share(self, num_groups: int) -> float:
        """Share of all tokens in the smallest group."""


def candidate_numbers(
    names: Sequence[str], pins: Pins, spread: Sequence[str], *, powers_of_two: bool = False
) -> list[int]:
    """Numbers of groups from 2 to half the datasets (2 of three) that the pins admit.

    Datasets pinned together count as one, those spread over the groups do not count.
    """
    joined = {name: name for name in names if name not in spread}
    for listed in pins.together:
        roots = {joined[name] for name in listed if name in joined}
        joined = {name: min(roots) if root in roots else root for name, root in joined.items()}
    items = len(set(joined.values()))
    least = max([2, *map(len, map(set, pins.apart)), *(k + 1 for k in pins.group.values())])
    most = max(2, items // 2) if items > 2 else 1
    numbers = range(least, most + 1)
    return [number for number in numbers if not (powers_of_two and number & (number - 1))]


def choose_num_groups(
    candidates: Sequence[int],
    splits: Splits,
    conflict: Conflict,
    steps: float,
    min_steps: int = 100,
) -> Choice:
    """Returns the largest K that qualifies, or 1 with the reason.

    K is 1 where no cosine is below zero by two standard errors. Else K qualifies if, on held-out
    blocks,

    1. the pairs that it keeps in one group are more alike than those that it parts and the next
       smaller K that qualifies does not (Student's t, 0.5 % for all together), which agree
       at most half as much;
    2. the pairs that it parts conflict: their mean cosine is below zero (as sure as that), or at
       least 5 % of them surely conflict;
    3. its shortest branch takes ``min_steps`` optimizer steps.

    Args:
        candidates: K, each 2 or more, rising; no branch may be too short on the average.
        splits: the splits and their contrasts.
        conflict: conflicts of the datasets.
        steps: optimizer steps of the joint run: a branch with a share p of the tokens takes p *
            steps.
        min_steps: least number of steps of the shortest branch.
    """
    reason = _no_reason_to_split(candidates, splits, conflict, steps, min_steps)
    if reason:
        return Choice(1, f"splitting would not help: {reason}", ())
    chance = CHANCE / len(candidates)
    tried: list[Tried] = []
    accepted = 1
    for number in candidates:
        row = _try(number, accepted, chance, splits, conflict)
        row = replace(row, steps=steps * splits.smallest_share(number))
        row = replace(row, taken=row.taken and row.steps >= min_steps)
        tried.append(row)
        accepted = number if row.taken else accepted
    if accepted == 1:
        return Choice(1, f"splitting would not help: {_why_not(tried, min_steps)}", tuple(tried))
    row = next(row for row in tried if row.num_groups == accepted)
    return Choice(
        accepted,
        f"{accepted} groups: {_contrast(row.whole)}; "
        f"the shortest branch takes {row.steps:.0f} steps",
        tuple(tried),
    )


def measure_parting(number: int, accepted: int, splits: Splits, conflict: Conflict) -> Tried:
    """Contrasts the split in ``number`` groups with the one in ``accepted`` and with one group."""
    fine = splits.held_out(number)
    return Tried(
        num_groups=number,
        coarser=accepted,
        parting=splits.contrast(splits.held_out(accepted), fine),
        whole=splits.contrast(np.zeros_like(fine), fine),
        sure_share=_sure_share(conflict, splits.labels(number)),
    )


def _try(number: int, accepted: int, chance: float, splits: Splits, conflict: Conflict) -> Tried:
    """Measures a number of groups; on blocks that the split knows where these show nothing."""
    blocks = len(splits.held_out(1))
    fine = np.tile(splits.labels(number), (blocks, 1))
    coarse = np.tile(splits.labels(accepted), (blocks, 1))
    known = splits.contrast(coarse, fine)
    if not _separates(known, chance):
        return Tried(number, accepted, known, splits.contrast(np.zeros_like(fine), fine), 0.0)
    row = measure_parting(number, accepted, splits, conflict)
    conflicts = row.sure_share >= _FEW_CONFLICTS or row.whole.opposes(chance)
    return replace(row, taken=conflicts and _separates(row.parting, chance))


def _separates(parting: Parting, chance: float) -> bool:
    return parting.separates(chance) and parting.parted <= _MOST_KEPT * parting.kept


def _sure_share(conflict: Conflict, labels: Labels) -> float:
    """Share of sure conflicts among the resolved pairs that a split parts."""
    apart = (labels[:, None] != labels) & (labels[:, None] >= 0) & (labels >= 0)
    known = np.triu(apart & ~np.isnan(conflict.cosine), 1)
    return float(conflict.surely_negative[known].mean()) if known.any() else 0.0


def _no_reason_to_split(
    candidates: Sequence[int], splits: Splits, conflict: Conflict, steps: float, min_steps: int
) -> str:
    if not candidates:
        return "there are fewer than three datasets to put into groups"
    fewest = candidates[0]
    if steps / fewest < min_steps:
        return (
            f"{fewest} branches would take {steps / fewest:.0f} optimizer steps each, "
            f"fewer than {min_steps}"
        )
    if not splits.differs:
        return (
            "the gradients differ by no more than their noise, "
            "so nothing is left to measure a split by"
        )
    if not conflict.certain_negative_fraction:
        return (
            "no pair of datasets conflicts: no cosine of mean gradients is below zero by two "
            "standard errors"
        )
    return ""


def _why_not(tried: Sequence[Tried], min_steps: int) -> str:
    for row in tried:
        if row.steps < min_steps:
            return (
                f"the shortest of {row.num_groups} branches would take {row.steps:.0f} "
                f"optimizer steps, fewer than {min_steps}, though {_contrast(row.whole)}"
            )
    best = min(tried, key=lambda row: (math.isnan(row.whole.parted), row.whole.parted))
    return (
        f"no split parts pairs that surely conflict; for {best.num_groups} groups "
        f"{_contrast(best.whole)}"
    )


def _contrast(whole: Parting) -> str:
    kept = "unknown" if math.isnan(whole.kept) else f"{whole.kept:+z.3f}"
    if math.isnan(whole.parted):
        return "no parted pair can be measured"
    return (
        f"on held-out blocks the pairs that it parts have a mean cosine of {whole.parted:+z.3f} "
        f"± {whole.parted_error:.3f}, those that it keeps {kept}"
    )
