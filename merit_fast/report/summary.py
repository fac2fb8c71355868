"""Sums up split.json in sentences and as lines for a terminal."""

from collections.abc import Iterable, Sequence
from statistics import mean, median

from merit_fast.manifests.schemas import MergeAudit, PartConflict, SplitDataset, SplitManifest
from merit_fast.report.advice import advise
from merit_fast.report.reasons import (
    COSINE_NOTE,
    balance_sentences,
    conflict_sentence,
    exceeds_one,
    mixture_sentence,
    parting_sentence,
    separation_sentence,
    shown_cosine,
    signal_sentence,
    structure_sentence,
)
from merit_fast.report.split_tables import (
    group_members,
    group_name,
    group_rows,
    separation_rows,
    signal_text,
    signed,
)
from merit_fast.report.tables import ABSENT, Table, percent

_LISTED = 10  # names in one line of the terminal
_SMALL = 0.1  # share of the median margin
_ALIKE = 0.9  # cosine below which it matters how rows are weighed


def verdict(split: SplitManifest, steps: Sequence[int] | None = None) -> tuple[str, ...]:
    """The advice, then its grounds: conflict, number of groups, separation, balance and noise.

    Args:
        split: the split.
        steps: optimizer steps [K] of each group's branch, if they are known.
    """
    structure = structure_sentence(split)
    mixture = mixture_sentence(split)
    return (
        advise(split, steps).sentence,
        conflict_sentence(split),
        *_groups(split),
        *([structure] if structure else []),
        *balance_sentences(split),
        signal_sentence(split),
        *([mixture] if mixture else []),
        *rows_sentences(split),
    )


def rows_sentences(split: SplitManifest) -> tuple[str, ...]:
    """Names datasets whose mean depends on how rows are weighed, and those that share rows."""
    sentences = []
    odd = [
        f"{row.name} ({row.weighting_cosine:.3f}; median {row.median_length:,} tokens, 95 % at "
        f"most {row.long_length:,})"
        for row in split.datasets
        if row.weighting_cosine is not None and row.weighting_cosine < _ALIKE
    ]
    if odd:
        meaning = (
            "long rows decide, as in training; cosines by examples would differ"
            if split.weight == "tokens"
            else "this split counts every row once, but training counts target tokens; "
            "split.weight: tokens sketches what is trained"
        )
        sentences.append(
            "Warning: the mean gradient by target tokens and the one by examples differ, cosine "
            f"below {_ALIKE}: {_listed(odd, ', ')}: {meaning}."
        )
    shared = [
        f"{pair.first} and {pair.second} ({pair.rows:,})"
        for pair in sorted(split.shared_rows, key=lambda pair: -pair.rows)
    ]
    if shared:
        sentences.append(
            f"Datasets share sketched rows: {_listed(shared, ', ')}. Their cosines come from "
            "products of different blocks of rows, so a row never meets itself."
        )
    return tuple(sentences)


def split_lines(split: SplitManifest, steps: Sequence[int] | None = None) -> tuple[str, ...]:
    """The split for a terminal: the advice, tables of groups and numbers tried, the verdict.

    Args:
        split: the split.
        steps: optimizer steps [K] of each group's branch, if they are known.
    """
    advice, *grounds = verdict(split, steps)
    lines = [advice, "", f"{method_sentence(split)}:", *_aligned(group_rows(split, steps))]
    if split.separations:
        lines += ["", *_aligned(separation_rows(split))]
    lines.append("")
    if split.across_cosine is not None:
        within = shown_cosine(split.within_cosine)
        across = shown_cosine(split.across_cosine)
        lines.append(f"mean cosine of pairs within groups {within}, across groups {across}")
    lines += _part_lines(split)
    if exceeds_one(split):
        lines.append(COSINE_NOTE)
    border = [
        f"{row.name} (margin {row.margin:z.2g}, stability {row.stability:.2f})"
        for row in small_margins(split)
    ]
    if border:
        names = _listed(border, ", ")
        lines.append(f"small margin, another group would do as well but for the balance: {names}")
    unknown = [f"{row.name}: {signal_text(row)}" for row in split.datasets if row.more_examples]
    if unknown:
        lines.append(_listed(unknown, "; "))
    lines += [
        f"{group_name(group)}: {', '.join(names) or 'none'}"
        for group, names in group_members(split).items()
    ]
    return (*lines, "", *grounds)


def part_rows(split: SplitManifest) -> Table:
    """One row per part of the model: its share of the gradient, its conflicts, its cosines."""
    columns = ("part", "share", "sure conflicts", "across groups", "within", "across")
    rows = tuple(
        (
            name,
            _mean_share(part),
            f"{part.sure_conflicts} of {_num_known(part)}",
            str(part.sure_conflicts_across),
            signed(part.within_cosine),
            signed(part.across_cosine),
        )
        for name, part in split.parts.items()
    )
    return columns, rows


def _part_lines(split: SplitManifest) -> list[str]:
    lines = []
    for name, part in split.parts.items():
        number = _num_known(part)
        pairs = "1 pair surely conflicts" if number == 1 else f"{number} pairs surely conflict"
        lines.append(
            f"{name}: {part.sure_conflicts} of {pairs}, {part.sure_conflicts_across} of them "
            f"across groups; {_mean_share(part)} of the squared gradient"
        )
    return lines


def _mean_share(part: PartConflict) -> str:
    shares = [share for share in part.norm_shares if share is not None]
    return percent(mean(shares)) if shares else ABSENT


def _num_known(part: PartConflict) -> int:
    return sum(cosine is not None for i, row in enumerate(part.similarity) for cosine in row[:i])


def method_sentence(split: SplitManifest) -> str:
    """The method and its result, without a full stop."""
    number = len(split.datasets)
    datasets = f"{number} {'dataset' if number == 1 else 'datasets'}"
    if split.groups == 1:
        return f"{datasets} in one group"
    balance = "" if split.balance == "none" else f", balanced by {split.balance}"
    return f"{datasets} in {split.groups} groups by {split.method}{balance}"


def audit_sentence(audit: MergeAudit) -> str:
    """Whether the theory of the gain holds for a merge, without a full stop."""
    gains = f"gain {audit.gain:z.4f}, predicted {audit.predicted_gain:z.4f}"
    figures = f"{gains}, ratio {audit.ratio:.3f}"
    if audit.in_basin:
        return f"{figures}: the branches lie in one quadratic basin"
    return f"{figures}, more than 10 % off 1: the branches do not lie in one quadratic basin"


def _groups(split: SplitManifest) -> tuple[str, ...]:
    if split.groups == 1:
        reason = split.reason or "one group was asked for, so nothing is split"
        return (f"{reason[0].upper()}{reason[1:]}.",)
    parting = parting_sentence(split)
    if split.reason:
        return (
            f"The number of groups was chosen automatically: {split.reason}.",
            separation_sentence(split),
        )
    return (separation_sentence(split), *([parting] if parting else []))


def _listed(items: Sequence[str], separator: str) -> str:
    more = f"{separator}and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return separator.join(items[:_LISTED]) + more


def _aligned(table: Table) -> Iterable[str]:
    """Lines of a table, the first column left-aligned and the figures right-aligned."""
    columns, rows = table
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def small_margins(split: SplitManifest) -> list[SplitDataset]:
    """The datasets near a border, nearest first: moving them to another group costs little.

    Margins are compared per unit of weight in the balance. A margin is small if it is at most a
    tenth of their median, or 0.
    """
    samples = split.balance == "samples"
    per_weight = {
        i: row.margin / (row.num_examples if samples else row.num_target_tokens)
        for i, row in enumerate(split.datasets)
        if row.group >= 0
    }
    if split.groups == 1 or not per_weight:
        return []
    bound = max(0.0, _SMALL * median(per_weight.values()))
    return [
        split.datasets[i]
        for i in sorted(per_weight, key=lambda i: (per_weight[i], i))
        if per_weight[i] <= bound
    ]
