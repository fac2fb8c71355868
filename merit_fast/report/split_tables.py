"""The tables of a split, and the datasets worth a word: those near a border, those whose gradients are mostly noise."""

from collections.abc import Mapping, Sequence
from statistics import median

from merit_fast.manifests.schemas import SplitDataset, SplitManifest
from merit_fast.report.tables import ABSENT, Table, percent

_SMALL = 0.1  # of the median margin


def group_name(group: int) -> str:
    return "all groups" if group < 0 else f"group {group}"


def group_members(split: SplitManifest) -> Mapping[int, tuple[str, ...]]:
    """group -> its datasets in the manifest's order, every group 0..K-1 present; -1 last, if any are dealt to all."""
    groups = [*range(split.groups), *([-1] if any(row.group < 0 for row in split.datasets) else [])]
    return {
        group: tuple(row.name for row in split.datasets if row.group == group) for group in groups
    }


def group_totals(split: SplitManifest) -> list[tuple[float, float]]:
    """[K] (examples, target tokens) that each group trains on, with its equal share of what is dealt to all."""
    totals = []
    for group in range(split.groups):
        shares = [(row, 1.0 if row.group == group else 1 / split.groups) for row in split.datasets
                  if row.group in (group, -1)]  # fmt: skip
        totals.append(
            (
                sum(row.num_examples * part for row, part in shares),
                sum(row.num_target_tokens * part for row, part in shares),
            )
        )
    return totals


def group_rows(split: SplitManifest, steps: Sequence[int] | None = None) -> Table:
    """One row per group; the share is of the mixture's target tokens, cosines are means over pairs that are known.

    steps: [K] optimizer steps of each group's branch, where they are known.
    """
    total = sum(row.num_target_tokens for row in split.datasets)
    spread = sum(row.group < 0 for row in split.datasets)
    columns = ("group", "datasets", "examples", "target tokens", "share", *(["steps"] if steps else []),
               "cosine within", "cosine to others")  # fmt: skip
    rows = []
    for group, (examples, tokens) in enumerate(group_totals(split)):
        own = str(sum(row.group == group for row in split.datasets))
        rows.append(
            (
                group_name(group),
                f"{own} + {spread} in part" if spread else own,
                f"{examples:,.0f}",
                f"{tokens:,.0f}",
                percent(tokens / total) if total else ABSENT,
                *([f"{steps[group]:,}"] if steps else []),
                *map(signed, _group_cosines(split, group)),
            )
        )
    return columns, tuple(rows)


def separation_rows(split: SplitManifest) -> Table:
    """One row per K tried: eta squared of its split, and what random balanced splits reach."""
    columns = (
        "groups",
        "η² debiased",
        "η² cross-validated",
        "η² of random groups",
        "above random, sd",
    )
    rows = []
    for found in split.separations:
        chance = ABSENT
        if found.null_mean is not None and found.null_std is not None:
            chance = f"{found.null_mean:z.4f} ± {found.null_std:.4f}"
        above = deviations_above(found.cross_validated, found.null_mean, found.null_std)
        rows.append(
            (
                f"{found.groups}{' (chosen)' if found.groups == split.groups else ''}",
                *(
                    ABSENT if value is None else f"{value:z.4f}"
                    for value in (found.eta_squared, found.cross_validated)
                ),
                chance,
                ABSENT if above is None else f"{above:+z.1f}",
            )
        )
    return columns, tuple(rows)


def deviations_above(
    value: float | None, mean: float | None, deviation: float | None
) -> float | None:
    """By how many standard deviations ``value`` lies above ``mean``; None where one of them is not known."""
    if value is None or mean is None or not deviation:
        return None
    return (value - mean) / deviation


def split_rows(split: SplitManifest) -> Table:
    """One row per dataset of the split: groups, counts, gradient figures and scores."""
    axes = tuple(f"axis {axis + 1}" for axis in range(len(split.explained_variance)))
    counts = ("group", "random control", "examples", "target tokens", "examples sketched")
    figures = (
        "loss",
        "gradient norm",
        "signal fraction",
        "more examples needed",
        "margin",
        "stability",
    )
    rows = tuple(
        (
            row.name,
            "all" if row.group < 0 else str(row.group),
            str(random),
            *(
                f"{count:,}"
                for count in (row.num_examples, row.num_target_tokens, row.num_sketched_examples)
            ),
            f"{row.mean_loss:z.3f}",
            norm_text(row),
            with_error(row.signal_fraction, row.signal_error),
            f"{row.more_examples:,}" if row.more_examples else ABSENT,
            f"{row.margin:z.3g}",
            f"{row.stability:.3f}",
            *(with_error(score, error) for score, error in zip(scores, errors, strict=True)),
        )
        for row, random, scores, errors in zip(
            split.datasets, split.random_groups, split.scores, split.score_errors, strict=True
        )
    )
    return ("dataset", *counts, *figures, *axes), rows


def with_error(value: float, error: float | None) -> str:
    return f"{value:z.3f} ± {'unknown' if error is None else f'{error:.3f}'}"


def norm_text(row: SplitDataset) -> str:
    return "not resolved" if row.gradient_norm is None else f"{row.gradient_norm:.3g}"


def signal_text(row: SplitDataset) -> str:
    """What it would take to know a dataset's gradient; "" where it is known."""
    if not row.more_examples:
        return ""
    known = row.signal_error is not None and row.signal_fraction > row.signal_error
    about = "about" if known else "at least"
    return f"not resolvable: needs {about} {row.more_examples:,} more examples"


def small_margins(split: SplitManifest) -> list[SplitDataset]:
    """The datasets near a border, nearest first: a move to their best other group would cost little, or gain.

    Margins are compared per weight in the balance. Small is at most a tenth of their median, or 0.
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


def known_pairs(split: SplitManifest) -> list[tuple[int, int, float]]:
    """(i, j, cosine) of every pair i < j whose cosine is resolved."""
    number = range(len(split.datasets))
    pairs = ((i, j, split.similarity[i][j]) for i in number for j in number[i + 1 :])
    return [(i, j, cosine) for i, j, cosine in pairs if cosine is not None]


def signed(value: float | None) -> str:
    return ABSENT if value is None else f"{value:+z.3f}"


def _group_cosines(split: SplitManifest, group: int) -> tuple[float | None, float | None]:
    """Mean cosine of the pairs inside a group, and of those with one dataset in it."""
    inside = [row.group == group for row in split.datasets]
    pairs = known_pairs(split)
    within = [cosine for i, j, cosine in pairs if inside[i] and inside[j]]
    across = [cosine for i, j, cosine in pairs if inside[i] != inside[j]]
    return _mean(within), _mean(across)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
