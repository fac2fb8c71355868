"""How many groups, if any: the largest number whose split stands out of chance and whose branches train long enough."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from merit_fast.split.separation import Separation

_DEVIATIONS = 2.0
_CANDIDATES = (2, 4, 8)
_DATASETS_PER_GROUP = 4  # with fewer, too few random splits differ for a null


@dataclass(frozen=True)
class Choice:
    """groups: K. reason: one sentence. separations: of every K that was measured."""

    groups: int
    reason: str
    separations: dict[int, Separation]


def candidate_groups(num_datasets: int) -> list[int]:
    """2, 4 and 8, as far as there are four datasets per group."""
    return [groups for groups in _CANDIDATES if groups * _DATASETS_PER_GROUP <= num_datasets]


def choose_groups(
    candidates: Iterable[int],
    measure: Callable[[int], tuple[Separation, float]],
    steps: float,
    min_steps: int = 100,
) -> Choice:
    """The largest K that qualifies, or 1.

    K qualifies if its cross-validated eta squared beats its null by two standard deviations; if, over the next smaller
    K that qualifies, it grew by more than random splits do, by two standard deviations (two groups cut in half are no
    four groups); and if its shortest branch takes ``min_steps`` optimizer steps.

    Args:
        candidates: K, each 2 or more.
        measure: K -> how its split separates, and the share of its smallest group in all tokens.
        steps: optimizer steps of the joint run: a branch with a share p of the tokens takes p * steps.
        min_steps: that the shortest branch must take.
    """
    measured: dict[int, tuple[Separation, float]] = {}
    chosen, fewest = 1, 0
    for groups in sorted(set(candidates)):
        fewest = fewest or groups
        if steps / groups < min_steps:
            break
        measured[groups] = found, share = measure(groups)
        if steps * share < min_steps or not found.better_than_random:
            continue
        if chosen == 1 or _grew(measured[chosen][0], found):
            chosen = groups
    separations = {groups: found for groups, (found, _) in measured.items()}
    if chosen == 1:
        return Choice(
            1,
            f"splitting would not help: {_why_not(measured, fewest, steps, min_steps)}",
            separations,
        )
    found, share = measured[chosen]
    return Choice(
        chosen,
        f"{chosen} groups: {_say(found)}; the shortest branch takes {steps * share:.0f} steps",
        separations,
    )


def _grew(coarse: Separation, fine: Separation) -> bool:
    growth, chance = (
        fine.cross_validated - coarse.cross_validated,
        fine.null_mean - coarse.null_mean,
    )
    return growth > chance + _DEVIATIONS * math.hypot(fine.null_std, coarse.null_std)


def _why_not(
    measured: dict[int, tuple[Separation, float]], fewest: int, steps: float, min_steps: int
) -> str:
    if not fewest:
        return "there are too few datasets to tell a split from a random one"
    if not measured:
        return f"{fewest} branches would take {steps / fewest:.0f} optimizer steps each, fewer than {min_steps}"
    for groups, (found, share) in measured.items():
        if found.better_than_random:
            return (
                f"the shortest of {groups} branches would take {steps * share:.0f} optimizer steps, fewer than "
                f"{min_steps}, though {_say(found)}"
            )
    if all(math.isnan(found.cross_validated) for found, _ in measured.values()):
        return "the gradients differ by no more than their noise, so nothing is left to measure a split by"
    excess = {
        groups: found.cross_validated - found.null_mean for groups, (found, _) in measured.items()
    }
    groups = max((k for k in excess if not math.isnan(excess[k])), key=lambda k: excess[k])
    return f"no split stands out of random ones; for {groups} groups {_say(measured[groups][0])}"


def _say(found: Separation) -> str:
    return (
        f"cross-validated eta squared is {found.cross_validated:.3f}, of random splits {found.null_mean:.3f} ± "
        f"{found.null_std:.3f}"
    )
