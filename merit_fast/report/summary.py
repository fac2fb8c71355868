"""Sums up split.json in sentences and as lines for a terminal."""

from collections.abc import Iterable, Sequence
from statistics import median

from merit_fast.manifests.schemas import MergeAudit, SplitManifest
from merit_fast.report.split_tables import (
    deviations_above,
    group_members,
    group_name,
    group_rows,
    known_pairs,
    separation_rows,
    signal_text,
    signed,
    small_margins,
)
from merit_fast.report.tables import Table, percent

_LISTED = 10  # names in one line of the terminal


def verdict(split: SplitManifest) -> tuple[str, ...]:
    """Sentences on the conflict, the number of groups, their separation, balance and noise."""
    balance = (f"Balance: {split.note}.",) if split.note else ()
    return (_conflict(split), *_groups(split), *balance, _noise(split))


def split_lines(split: SplitManifest, steps: Sequence[int] | None = None) -> tuple[str, ...]:
    """The split for a terminal: tables of the groups and of the numbers tried, then the verdict.

    Args:
        split: the split.
        steps: optimizer steps [K] of each group's branch, if they are known.
    """
    lines = [f"{method_sentence(split)}:", *_aligned(group_rows(split, steps))]
    if split.separations:
        lines += ["", *_aligned(separation_rows(split))]
    lines.append("")
    if split.across_cosine is not None:
        within = signed(split.within_cosine)
        across = signed(split.across_cosine)
        lines.append(f"mean cosine of pairs within groups {within}, across groups {across}")
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
    return (*lines, "", *verdict(split))


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


def exceeds_null(split: SplitManifest) -> bool:
    """Whether cross-validated eta squared lies more than two sd above that of random splits."""
    measured = split.separation
    if (
        measured is None
        or measured.cross_validated is None
        or measured.null_mean is None
        or measured.null_std is None
    ):
        return False
    return measured.cross_validated > measured.null_mean + 2 * measured.null_std


def _conflict(split: SplitManifest) -> str:
    number = len(split.datasets)
    known = len(known_pairs(split))
    where = split.sketched_at
    pairs = number * (number - 1) // 2
    if not pairs:
        return "One dataset has none to conflict with."
    if not known:
        return (
            f"The cosine of no pair of datasets is resolved {where}: "
            "whether they conflict is not known."
        )
    if split.negative_pair_fraction == 0:
        return f"No pair of datasets conflicts {where}: splitting has little to separate here."
    which = (
        f"{known:,} pairs of datasets"
        if known == pairs
        else f"{known:,} resolved pairs of datasets (of {pairs:,})"
    )
    return (
        f"{percent(split.negative_pair_fraction)} of the {which} conflict {where} "
        f"(their mean gradients have a cosine below 0), "
        f"{percent(split.certain_negative_fraction)} by more than two standard errors."
    )


def _groups(split: SplitManifest) -> tuple[str, ...]:
    if split.groups == 1:
        reason = split.reason or "one group was asked for, so nothing is split"
        return (f"{reason[0].upper()}{reason[1:]}.",)
    if split.reason:
        return (
            f"The number of groups was chosen automatically: {split.reason}.",
            _separation(split),
        )
    return (_separation(split),)


def _separation(split: SplitManifest) -> str:
    measured = split.separation
    if measured is None or measured.eta_squared is None:
        return (
            "The datasets differ by no more than the noise of their gradients: "
            "no split can be told from another."
        )
    explained = (
        f"The groups account for {percent(measured.eta_squared)} of the spread "
        "between datasets (η², debiased)"
    )
    above = deviations_above(measured.cross_validated, measured.null_mean, measured.null_std)
    if measured.cross_validated is None or measured.null_mean is None or measured.null_std is None:
        return f"{explained}; there are too few examples to tell that from chance."
    negation = "" if exceeds_null(split) else "not "
    deviations = "" if above is None else f" ({above:+z.1f})"
    return (
        f"{explained}; found on one half of the examples and measured on the other, "
        f"{percent(measured.cross_validated)}, "
        f"random balanced groups {percent(measured.null_mean)} "
        f"(standard deviation {percent(measured.null_std)}): {negation}more than "
        f"two standard deviations above chance{deviations}."
    )


def _noise(split: SplitManifest) -> str:
    signal = median(row.signal_fraction for row in split.datasets)
    unknown = sum(row.more_examples > 0 for row in split.datasets)
    which = "every dataset's signal is resolved"
    if unknown:
        which = (
            f"the signal of {unknown} of {len(split.datasets)} datasets "
            "is not resolved by so few examples"
        )
    median_signal = f"The median signal fraction of the gradients is {signal:.2f} (1 is noiseless)"
    return f"{median_signal}; {which}."


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
