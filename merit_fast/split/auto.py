"""The number of groups: the largest with a split that beats chance and branches that train long
enough, or 1.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from merit_fast.split.separation import Separation

_DEVIATIONS = 2.0
_CANDIDATES = (2, 4, 8)
_DATASETS_PER_GROUP = 4  # with fewer, too few random splits differ for a null

Measured = dict[int, tuple[Separation, float]]


@dataclass(frozen=True)
class Choice:
    """num_groups: K. reason: one sentence. separations: of every K that was measured."""

    num_groups: int
    reason: str
    separations: dict[int, Separation]


def candidate_numbers(num_datasets: int) -> list[int]:
    """2, 4 and 8, as far as there are four datasets per group."""
    return [number for number in _CANDIDATES if number * _DATASETS_PER_GROUP <= num_datasets]


def choose_num_groups(
    candidates: Iterable[int],
    measure: Callable[[int], tuple[Separation, float]],
    steps: float,
    min_steps: int = 100,
) -> Choice:
    """Returns the largest K that qualifies, or 1.

    K qualifies if its cross-validated eta squared beats its null, 20 other splits or more, by two
    standard deviations; if, over the next smaller K that qualifies, it grew by more than random
    splits do, by two standard deviations (two groups cut in half are no four groups); and if its
    shortest branch takes ``min_steps`` optimizer steps.

    Args:
        candidates: K, each 2 or more.
        measure: K -> separation of its split, and the share of its smallest group in all tokens.
        steps: optimizer steps of the joint run: a branch with a share p of the tokens takes p *
            steps.
        min_steps: least number of steps of the shortest branch.
    """
    measured: Measured = {}
    chosen = 1
    fewest = 0
    for number in sorted(set(candidates)):
        fewest = fewest or number
        if steps / number < min_steps:
            break
        separation, share = measure(number)
        measured[number] = separation, share
        if steps * share < min_steps or not separation.better_than_random:
            continue
        if chosen == 1 or _grew(measured[chosen][0], separation):
            chosen = number
    separations = {number: separation for number, (separation, _) in measured.items()}
    if chosen == 1:
        reason = _why_not(measured, fewest, steps, min_steps)
        return Choice(1, f"splitting would not help: {reason}", separations)
    separation, share = measured[chosen]
    return Choice(
        chosen,
        f"{chosen} groups: {_comparison(separation)}; "
        f"the shortest branch takes {steps * share:.0f} steps",
        separations,
    )


def _grew(coarse: Separation, fine: Separation) -> bool:
    growth = fine.cross_validated - coarse.cross_validated
    chance = fine.null_mean - coarse.null_mean
    return growth > chance + _DEVIATIONS * math.hypot(fine.null_std, coarse.null_std)


def _why_not(measured: Measured, fewest: int, steps: float, min_steps: int) -> str:
    if not fewest:
        return "there are too few datasets to tell a split from a random one"
    if not measured:
        return (
            f"{fewest} branches would take {steps / fewest:.0f} optimizer steps each, "
            f"fewer than {min_steps}"
        )
    for number, (separation, share) in measured.items():
        if separation.better_than_random:
            return (
                f"the shortest of {number} branches would take {steps * share:.0f} "
                f"optimizer steps, fewer than {min_steps}, though {_comparison(separation)}"
            )
    if all(math.isnan(separation.cross_validated) for separation, _ in measured.values()):
        return (
            "the gradients differ by no more than their noise, "
            "so nothing is left to measure a split by"
        )
    judged = {number: found for number, (found, _) in measured.items() if found.judged}
    if not judged:
        number, (separation, _) = next(iter(measured.items()))
        others = len(separation.null)
        return (
            f"a split into {number} groups cannot be told from chance: "
            f"{others} other balanced splits exist, so p >= {1 / (others + 1):.2g}"
        )
    excess = {number: found.cross_validated - found.null_mean for number, found in judged.items()}
    best = max((k for k in excess if not math.isnan(excess[k])), key=lambda k: excess[k])
    return f"no split stands out of random ones; for {best} groups {_comparison(judged[best])}"


def _comparison(separation: Separation) -> str:
    return (
        f"cross-validated eta squared is {_shown(separation.cross_validated)}, "
        f"of random splits {_shown(separation.null_mean)} ± {separation.null_std:.3f}"
    )


def _shown(share: float) -> str:
    """A share of one whole; an estimate outside [0, 1] is noise."""
    return f"{share:.3f}" if 0 <= share <= 1 else "not resolved"
