"""Advice on a split before anything is trained: split, do not split, or measure more.

Training apart can only help where groups pull the weights against each other, so a split is advised
if all of this holds: most of the gradients are resolved; the split separates better than other
balanced splits; pairs of datasets surely conflict, in a share that matters, and the groups part
them; and no branch is too short. The gain that theory promises is over the mean branch, not over
joint training (docs/method.md), so structure without conflict is no reason to split.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from merit_fast.manifests.schemas import SplitManifest
from merit_fast.report.reasons import (
    FEW_STEPS,
    balance_sentences,
    beats_all,
    beats_null,
    conflict_sentence,
    conflict_share,
    needs,
    parting_sentence,
    separation_sentence,
    shown_cosine,
    signal_sentence,
    steps_sentence,
    structure_sentence,
    unresolved,
)
from merit_fast.report.tables import percent

Word = Literal["split", "do not split", "measure more"]
CONFIG = "CONFIG.yml"  # stands for the run's file in ``Advice.next``

_FEW_CONFLICTS = 0.05  # share of the pairs below which conflict does not shape a mixture
_CLEAR_ERROR = 0.1  # standard error of a cosine that leaves no conflict of weight unseen
_MOST_UNRESOLVED = 0.5  # share of the target tokens
_AUTO = "splitting would not help: "  # opens the reason for one group, chosen automatically


_TRAIN_JOINTLY = (
    "train jointly, and interpolate towards the base to keep what it knows (WiSE-FT): "
    f"merit-fast run {CONFIG} split.groups=1 train.controls.joint=true"
)


@dataclass(frozen=True)
class Advice:
    """Whether to split a mixture.

    Attributes:
        advice: in two or three words.
        sentence: the advice with its main reason.
        groups: K of the split that was judged.
        reasons: sentences: signal, null, conflicts, steps, balance.
        next: things to do, most useful first, with their commands; CONFIG.yml stands for the run's
            file.
    """

    advice: Word
    sentence: str
    groups: int
    reasons: tuple[str, ...]
    next: tuple[str, ...]


@dataclass(frozen=True)
class _Finding:
    """One check's objection to a split."""

    advice: Word
    because: str
    next: tuple[str, ...] = ()


def advise(split: SplitManifest, steps: Sequence[int] | None = None) -> Advice:
    """Judges a split by its figures.

    Args:
        split: the split.
        steps: optimizer steps [K] of each group's branch, if they are known.
    """
    checks: tuple[Callable[[], _Finding | None], ...] = (
        lambda: _one_dataset(split),
        lambda: _signal(split),
        lambda: _one_group(split),
        lambda: _separation(split),
        lambda: _conflict(split),
        lambda: _parted(split),
        lambda: _steps(split, steps),
    )
    findings = (check() for check in checks)
    finding = next((found for found in findings if found), None) or _go(split)
    opening = "split into" if finding.advice == "split" else f"{finding.advice}:"
    return Advice(
        advice=finding.advice,
        sentence=f"{opening[0].upper()}{opening[1:]} {finding.because}.",
        groups=split.groups,
        reasons=_reasons(split, steps),
        next=finding.next,
    )


def _reasons(split: SplitManifest, steps: Sequence[int] | None) -> tuple[str, ...]:
    judged = split.groups > 1
    parting = parting_sentence(split)
    structure = structure_sentence(split) if judged else ""
    return (
        signal_sentence(split),
        *([separation_sentence(split)] if judged else []),
        *([parting] if parting else []),
        conflict_sentence(split),
        *([structure] if structure else []),
        *([steps_sentence(steps)] if steps else []),
        *(balance_sentences(split) if judged else ()),
    )


# ---- the checks, in the order of the reasons
def _one_dataset(split: SplitManifest) -> _Finding | None:
    if len(split.datasets) > 1:
        return None
    return _Finding("do not split", "one dataset makes one group", (_TRAIN_JOINTLY,))


def _signal(split: SplitManifest) -> _Finding | None:
    rows = unresolved(split)
    total = sum(row.num_target_tokens for row in split.datasets)
    unknown = sum(row.num_target_tokens for row in rows)
    if len(split.datasets) - len(rows) >= 2 and unknown <= _MOST_UNRESOLVED * total:
        return None
    wanted = max(row.num_sketched_examples + row.more_examples for row in rows)
    short = [
        row for row in rows if row.num_examples < row.num_sketched_examples + row.more_examples
    ]
    hint: tuple[str, ...] = ()
    if short:
        names = ", ".join(row.name for row in short[:3]) + (", ..." if len(short) > 3 else "")
        hint = (f"add rows to the datasets that have too few: {names}",)
    return _Finding("measure more", f"need {needs(rows)}", (_sketch(wanted), *hint))


def _one_group(split: SplitManifest) -> _Finding | None:
    if split.groups > 1:
        return None
    reason = split.reason.removeprefix(_AUTO) or "one group was asked for"
    return _Finding("do not split", reason, (*_other_numbers(split), _TRAIN_JOINTLY))


def _separation(split: SplitManifest) -> _Finding | None:
    measured = split.separation
    if beats_null(measured) or beats_all(measured) or _qualified(split):
        return None
    if measured is None or measured.eta_squared is None:
        reason = "the datasets differ by no more than the noise of their gradients"
    elif measured.cross_validated is None:
        reason = "half of the examples are too few to measure the split by"
    elif measured.null_std is None and measured.null_beaten is not None:
        reason = (
            f"the split separates better than {measured.null_beaten} of "
            f"{measured.null_splits} other balanced splits, too few to judge it"
        )
    else:
        reason = "the split separates the datasets no better than random ones do"
    others = (*_other_numbers(split), *_looser(split))
    return _Finding("do not split", reason, (*others, *_alternatives(split)))


def _conflict(split: SplitManifest) -> _Finding | None:
    known = split.known_pairs
    if conflict_share(split) >= _FEW_CONFLICTS or _qualified(split):
        return None
    errors = [
        error
        for i, j, cosine in known
        if cosine < 0 and (error := split.similarity_errors[i][j]) is not None
    ]
    if len(errors) >= max(1.0, _FEW_CONFLICTS * len(known)) and median(errors) > _CLEAR_ERROR:
        factor = math.ceil((median(errors) / _CLEAR_ERROR) ** 2)
        largest = max(row.num_sketched_examples for row in split.datasets)
        return _Finding(
            "measure more",
            f"need about {factor} times as many rows to tell whether the {len(errors)} of "
            f"{len(known)} pairs with a cosine below 0 conflict (errors of ±{median(errors):.2f})",
            (_sketch(factor * largest),),
        )
    reason = "no pair of datasets surely conflicts"
    if split.sure_conflicts:
        share = percent(conflict_share(split))
        reason = f"only {split.sure_conflicts} of {len(known)} pairs surely conflict ({share})"
    return _Finding("do not split", reason, _alternatives(split))


def _qualified(split: SplitManifest) -> bool:
    """Whether ``groups: auto`` chose the split, by conflicts on held-out blocks."""
    return split.parting is not None and split.parting.taken


def _parted(split: SplitManifest) -> _Finding | None:
    """Objects to groups that hold more of the conflicts than of the other pairs."""
    group = [row.group for row in split.datasets]
    pairs = split.known_pairs
    across = sum(group[i] != group[j] and min(group[i], group[j]) >= 0 for i, j, _ in pairs)
    if split.sure_conflicts_across * len(pairs) >= across * split.sure_conflicts:
        return None
    within = split.sure_conflicts - split.sure_conflicts_across
    return _Finding(
        "do not split",
        f"{within} of the {split.sure_conflicts} pairs that surely conflict stay in one group",
        (*_looser(split), *_alternatives(split)),
    )


def _steps(split: SplitManifest, steps: Sequence[int] | None) -> _Finding | None:
    if not steps or min(steps) >= FEW_STEPS:
        return None
    factor = math.ceil(FEW_STEPS / max(1, min(steps)))
    following = [f"train {factor} times as many epochs or rows (key train.epochs)"]
    if split.groups > 2:
        fewer = max(2, split.groups // 2)
        following.append(f"make fewer, longer branches: {_advise(f'split.groups={fewer}')}")
    return _Finding(
        "do not split",
        f"the shortest of {split.groups} branches would take {min(steps):,} optimizer steps, "
        f"fewer than {FEW_STEPS}",
        (*following, _TRAIN_JOINTLY),
    )


def _go(split: SplitManifest) -> _Finding:
    known = len(split.known_pairs)
    reason = (
        f"{split.sure_conflicts} of {known} pairs of datasets surely conflict, and the groups part "
        f"{split.sure_conflicts_across} of them"
    )
    if not split.sure_conflicts and split.parting is not None:
        cosine = shown_cosine(split.parting.parted_cosine, split.parting.parted_error)
        reason = f"the pairs of datasets that they part have a mean cosine of {cosine}"
    return _Finding(
        "split",
        f"{split.groups} groups: {reason}",
        (
            "train and compare with joint training and a random split: merit-fast run "
            f'{CONFIG} train.controls="{{joint: true, random: 1}}"',
        ),
    )


# ---- what to do next
def _advise(*assignments: str) -> str:
    return " ".join(("merit-fast advise", CONFIG, *assignments))


def _sketch(examples: int) -> str:
    return f"sketch more rows per dataset: {_advise(f'split.examples={examples}')}"


def _alternatives(split: SplitManifest) -> tuple[str, ...]:
    if split.sketched_at.startswith("after"):
        return (_TRAIN_JOINTLY,)
    warm = f"look for conflicts after a joint warm-up: {_advise('split.warmup=0.25')}"
    return (warm, _TRAIN_JOINTLY)


def _other_numbers(split: SplitManifest) -> tuple[str, ...]:
    better = [row.groups for row in split.separations if beats_null(row)]
    return tuple(
        f"split into {number}, which beats random splits: {_advise(f'split.groups={number}')}"
        for number in better
        if number != split.groups
    )


def _looser(split: SplitManifest) -> tuple[str, ...]:
    """A tolerance that admits the groups found without a balance, where they separate more."""
    measured = split.separation
    here = None if measured is None else measured.eta_squared
    free = split.unbalanced_eta_squared
    if not split.unbalanced or free is None or (here is not None and free <= here):
        return ()
    counts = [
        row.num_examples if split.balance == "samples" else row.num_target_tokens
        for row in split.datasets
    ]
    spread = sum(n for n, k in zip(counts, split.unbalanced, strict=True) if k < 0) / split.groups
    inside = [
        sum(n for n, k in zip(counts, split.unbalanced, strict=True) if k == group) + spread
        for group in range(split.groups)
    ]
    off = max(abs(part / sum(counts) - 1 / split.groups) for part in inside)
    tolerance = math.ceil(off * 100) / 100
    return (f"loosen the balance: {_advise(f'split.tolerance={tolerance:g}')}",)
