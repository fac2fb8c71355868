"""The tables of a split, and its datasets near a border or with mostly noise in their gradients."""

from collections.abc import Mapping, Sequence

from merit_fast.manifests.schemas import GroupCount, SplitDataset, SplitManifest
from merit_fast.report.tables import ABSENT, Table, percent

_ROUNDING = 1e-9  # of a share
_MANY_SPLITS = 20  # from so many on, a random control is like any other


def group_name(group: int) -> str:
    return "all groups" if group < 0 else f"group {group}"


def group_members(split: SplitManifest) -> Mapping[int, tuple[str, ...]]:
    """group -> its datasets in the manifest's order.

    Every group 0..K-1 is present; -1 comes last if datasets are shared by all groups.
    """
    groups = [*range(split.groups), *([-1] if any(row.group < 0 for row in split.datasets) else [])]
    return {
        group: tuple(row.name for row in split.datasets if row.group == group) for group in groups
    }


def group_totals(split: SplitManifest) -> list[tuple[float, float]]:
    """(examples, target tokens) [K] that each group trains on.

    A dataset of all groups counts with an equal share in each.
    """
    totals = []
    for group in range(split.groups):
        examples = 0.0
        tokens = 0.0
        for row in split.datasets:
            if row.group in (group, -1):
                share = 1.0 if row.group == group else 1 / split.groups
                examples += row.num_examples * share
                tokens += row.num_target_tokens * share
        totals.append((examples, tokens))
    return totals


def group_rows(split: SplitManifest, steps: Sequence[int] | None = None) -> Table:
    """One row per group, with its share of the target tokens and mean cosines of resolved pairs.

    Args:
        split: the split.
        steps: optimizer steps [K] of each group's branch, if they are known.
    """
    total = sum(row.num_target_tokens for row in split.datasets)
    spread = sum(row.group < 0 for row in split.datasets)
    columns = (
        *("group", "datasets", "examples", "target tokens", "share"),
        *(["steps"] if steps else []),
        *("cosine within", "cosine to others"),
    )
    rows = []
    for group, (examples, tokens) in enumerate(group_totals(split)):
        count = str(sum(row.group == group for row in split.datasets))
        rows.append(
            (
                group_name(group),
                f"{count} + {spread} in part" if spread else count,
                f"{examples:,.0f}",
                f"{tokens:,.0f}",
                percent(tokens / total) if total else ABSENT,
                *([f"{steps[group]:,}"] if steps else []),
                *map(signed, _group_cosines(split, group)),
            )
        )
    return columns, tuple(rows)


def separation_rows(split: SplitManifest) -> Table:
    """One row per K tried: eta squared of its split and of random balanced splits."""
    columns = (
        "groups",
        "η² debiased",
        "η² cross-validated",
        "η² of random groups",
        "above random, sd",
    )
    rows = []
    for row in split.separations:
        chance = ABSENT
        if row.null_mean is not None:
            spread = f" ± {row.null_std:.4f}" if row.null_std is not None else ""
            few = f" of {row.null_splits}" if row.null_splits and not spread else ""
            chance = f"{row.null_mean:z.4f}{spread}{few}"
        rows.append(
            (
                f"{row.groups}{' (chosen)' if row.groups == split.groups else ''}",
                *(
                    ABSENT if value is None else f"{value:z.4f}"
                    for value in (row.eta_squared, row.cross_validated)
                ),
                chance,
                _above(row),
            )
        )
    return columns, tuple(rows)


def deviations_above(
    value: float | None, mean: float | None, deviation: float | None
) -> float | None:
    """Standard deviations by which ``value`` exceeds ``mean``.

    None if a number is unknown, or if the deviation is rounding: all splits are the same.
    """
    if value is None or mean is None or deviation is None or deviation <= _ROUNDING:
        return None
    return (value - mean) / deviation


def same_as_random(row: GroupCount) -> bool:
    """Whether no other balanced split exists, or all separate the datasets alike."""
    if row.num_splits == 1:
        return True
    if row.null_mean is None or row.cross_validated is None or row.null_std is None:
        return False
    return row.null_std <= _ROUNDING and abs(row.cross_validated - row.null_mean) <= _ROUNDING


def _above(row: GroupCount) -> str:
    if same_as_random(row):
        return "the same"
    above = deviations_above(row.cross_validated, row.null_mean, row.null_std)
    return ABSENT if above is None else f"{above:+z.1f}"


def tried_rows(split: SplitManifest) -> Table:
    """One row per K tried: mean cosines of the pairs kept and parted, on held-out blocks."""
    columns = (
        "groups",
        "cosine of pairs kept",
        "of pairs parted",
        "compared with",
        "of pairs parted further",
        "less alike by",
    )
    rows = tuple(
        (
            f"{row.groups}{' (chosen)' if row.groups == split.groups else ''}",
            signed(row.kept_cosine),
            _or_absent(row.parted_cosine, row.parted_error),
            f"{row.coarser} {'group' if row.coarser == 1 else 'groups'}",
            signed(row.further_cosine),
            _or_absent(row.difference, row.difference_error),
        )
        for row in split.numbers_tried
    )
    return columns, rows


def _or_absent(value: float | None, error: float | None) -> str:
    return ABSENT if value is None else with_error(value, error)


def split_rows(split: SplitManifest) -> Table:
    """One row per dataset of the split: groups, counts, gradient figures and scores."""
    axes = tuple(f"axis {axis + 1}" for axis in range(len(split.explained_variance)))
    counts = (
        "group",
        *split.control_arms,
        "examples",
        "target tokens",
        "examples sketched",
    )
    figures = (
        "loss",
        "gradient norm",
        "signal fraction",
        "more examples needed",
        "margin",
        "stability",
        "noise scale",
        "suggested share",
        "median length",
        "95 % length",
        "cosine of both means",
    )
    rows = tuple(
        (
            row.name,
            short_group(row.group),
            *(short_group(control[i]) for control in split.controls),
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
            _figure(row.noise_scale, row.noise_scale_error, 0),
            _figure(row.suggested_share, row.suggested_share_error, 4),
            *(_figure(length, None, 0) for length in (row.median_length, row.long_length)),
            _figure(row.weighting_cosine, None, 3),
            *(with_error(score, error) for score, error in zip(scores, errors, strict=True)),
        )
        for i, (row, scores, errors) in enumerate(
            zip(split.datasets, split.scores, split.score_errors, strict=True)
        )
    )
    return ("dataset", *counts, *figures, *axes), rows


def _figure(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return ABSENT
    text = f"{value:,.{digits}f}"
    return text if error is None else f"{text} ± {error:,.{digits}f}"


def short_group(group: int) -> str:
    return "all" if group < 0 else str(group)


def control_note(split: SplitManifest) -> str:
    """The number of splits the random controls were drawn from, if it is small; else ""."""
    drawn = len(split.controls)
    if split.groups == 1 or split.num_splits is None:
        return ""
    others = split.num_splits - 1
    if not others:
        return "No random control: no other balanced split of these datasets exists."
    if others > _MANY_SPLITS or not drawn:
        return ""
    controls = "The random control is" if drawn == 1 else f"The {drawn} random controls are"
    splits = "balanced split exists" if others == 1 else "balanced splits exist"
    return f"{controls} {drawn} of {others}: only {others} other {splits}."


def with_error(value: float, error: float | None) -> str:
    return f"{value:z.3f} ± {'unknown' if error is None else f'{error:.3f}'}"


def norm_text(row: SplitDataset) -> str:
    return "not resolved" if row.gradient_norm is None else f"{row.gradient_norm:.3g}"


def signal_text(row: SplitDataset) -> str:
    """The examples that would resolve a dataset's gradient, as text; "" if it is resolved."""
    if not row.more_examples:
        return ""
    known = row.signal_error is not None and row.signal_fraction > row.signal_error
    about = "about" if known else "at least"
    return f"not resolvable: needs {about} {row.more_examples:,} more examples"


def signed(value: float | None) -> str:
    """A mean cosine; noise can carry the estimate beyond 1, which is shown as 1."""
    return ABSENT if value is None else f"{max(-1.0, min(1.0, value)):+z.3f}"


def _group_cosines(split: SplitManifest, group: int) -> tuple[float | None, float | None]:
    """Mean cosine of the pairs inside a group, and of the pairs with one dataset in it."""
    inside = [row.group == group for row in split.datasets]
    pairs = split.known_pairs
    within = [cosine for i, j, cosine in pairs if inside[i] and inside[j]]
    across = [cosine for i, j, cosine in pairs if inside[i] != inside[j]]
    return _mean(within), _mean(across)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
