"""What the figures of split.json say, in plain sentences."""

from statistics import median

from merit_fast.manifest import SplitManifest
from merit_fast.report.tables import group_members, group_rows, percent


def verdict(split: SplitManifest) -> tuple[str, str, str]:
    """Three sentences: do datasets conflict, do the groups stand out from random ones, how noisy is all that."""
    return (_conflict(split), _separation(split), _noise(split))


def split_lines(split: SplitManifest) -> tuple[str, ...]:
    """The split for a terminal: a line per group, then the verdict."""
    members, (_, rows) = group_members(split), group_rows(split)
    groups = [
        f"{row[0]}: {row[3]} target tokens ({row[4]}): {', '.join(names)}"
        for row, names in zip(rows, members.values(), strict=True)
    ]
    return (*groups, *verdict(split))


def _conflict(split: SplitManifest) -> str:
    number = len(split.datasets)
    pairs = number * (number - 1) // 2
    if split.negative_pair_fraction == 0:
        return "No pair of datasets conflicts at the base model: splitting has little to separate here."
    return (
        f"{percent(split.negative_pair_fraction)} of the {pairs:,} pairs of datasets conflict at the base model "
        "(their mean gradients have a cosine below 0)."
    )


def exceeds_null(split: SplitManifest) -> bool:
    """Whether eta squared lies more than two standard deviations above that of random balanced splits."""
    return split.eta_squared > split.eta_squared_null_mean + 2 * split.eta_squared_null_std


def _separation(split: SplitManifest) -> str:
    figures = (
        f"The groups account for {percent(split.eta_squared)} of the spread between datasets (η²), random balanced "
        f"groups for {percent(split.eta_squared_null_mean)} (standard deviation {percent(split.eta_squared_null_std)})"
    )
    if exceeds_null(split):
        return f"{figures}: more than two standard deviations above chance."
    return f"{figures}: not more than two standard deviations above chance."


def _noise(split: SplitManifest) -> str:
    signal = median(row.signal_fraction for row in split.datasets)
    return (
        "The split was chosen to account for spread, so it exceeds random groups even on noise; "
        f"the median signal fraction of the gradients is {signal:.2f} (1 is noiseless)."
    )
