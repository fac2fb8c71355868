"""Sentences on a split: its signal, null, conflicts, steps and balance, in the order of advice."""

from collections.abc import Sequence
from statistics import median

from merit_fast.manifests.schemas import GroupCount, SplitDataset, SplitManifest
from merit_fast.report.split_tables import deviations_above, same_as_random
from merit_fast.report.tables import percent

FEW_STEPS = 100  # as in training: below about so many steps a branch is far from converged
_NEAR = 0.9  # of the highest cosine: as alike as datasets of this mixture are
_LISTED = 3
COSINE_NOTE = (
    "Cosines are estimates free of sampling noise, so one near 1 may come out above it; they are "
    "shown as at most 1.000 and kept as estimated in split.json."
)


# ---- numbers that decide
def beats_null(measured: GroupCount | None) -> bool:
    """Whether cross-validated eta squared lies more than two sd above that of other splits."""
    if (
        measured is None
        or measured.cross_validated is None
        or measured.null_mean is None
        or measured.null_std is None
    ):
        return False
    return measured.cross_validated > measured.null_mean + 2 * measured.null_std


def beats_all(measured: GroupCount | None) -> bool:
    """Whether every other balanced split, too few for a deviation, separates less."""
    return (
        measured is not None
        and measured.null_std is None
        and measured.cross_validated is not None
        and measured.null_beaten == measured.null_splits
    )


def conflict_share(split: SplitManifest) -> float:
    """Share of the resolved pairs that surely conflict."""
    known = len(split.known_pairs)
    return split.sure_conflicts / known if known else 0.0


def unresolved(split: SplitManifest) -> list[SplitDataset]:
    """Datasets whose gradient does not stand out of its noise, those that need least first."""
    rows = [row for row in split.datasets if row.more_examples]
    return sorted(rows, key=lambda row: row.more_examples)


# ---- cosines
def shown_cosine(value: float | None, error: float | None = None) -> str:
    """A cosine for people: at most 1.000 in size, with its standard error if that is known."""
    if value is None:
        return "not resolved"
    text = f"{min(max(value, -1.0), 1.0):+z.3f}"
    return text if error is None else f"{text} ± {error:.3f}"


def exceeds_one(split: SplitManifest) -> bool:
    """Whether some cosine must be cut to be shown."""
    means = (split.within_cosine, split.across_cosine)
    pairs = (cosine for _, _, cosine in split.known_pairs)
    return any(value is not None and abs(value) > 1 for value in (*means, *pairs))


# ---- sentences
def signal_sentence(split: SplitManifest) -> str:
    """Names the datasets whose gradients are not resolved, and the rows that they need."""
    rows = unresolved(split)
    signal = median(row.signal_fraction for row in split.datasets)
    which = "every dataset's signal is resolved"
    if rows:
        which = (
            f"the signal of {len(rows)} of {len(split.datasets)} datasets "
            f"is not resolved by so few examples ({needs(rows)})"
        )
    return f"The median signal fraction of the gradients is {signal:.2f} (1 is noiseless); {which}."


def needs(rows: Sequence[SplitDataset]) -> str:
    """Rows that would resolve datasets, in words."""
    named = [f"{_about(row)} {row.more_examples:,} more rows of {row.name}" for row in rows]
    more = [f"more of {len(named) - _LISTED} other datasets"] if len(named) > _LISTED else []
    parts = [*named[:_LISTED], *more]
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _about(row: SplitDataset) -> str:
    known = row.signal_error is not None and row.signal_fraction > row.signal_error
    return "about" if known else "at least"


def separation_sentence(split: SplitManifest) -> str:
    """Share of the spread between groups, against that of other balanced splits."""
    measured = split.separation
    if measured is not None and measured.num_splits != 1 and same_as_random(measured):
        return (
            f"The split in {measured.groups} groups and random balanced ones are the same: "
            "nothing tells them apart."
        )
    if measured is None or measured.eta_squared is None:
        return (
            "The datasets differ by no more than the noise of their gradients: "
            "no split can be told from another."
        )
    explained = (
        f"The groups account for {percent(measured.eta_squared)} of the spread "
        "between datasets (η², debiased)"
    )
    if measured.null_std is None and measured.null_beaten is not None:
        return f"{explained}; this {_few_splits(split, measured)}."
    if measured.cross_validated is None or measured.null_mean is None or measured.null_std is None:
        return f"{explained}; there are too few examples to tell that from chance."
    above = deviations_above(measured.cross_validated, measured.null_mean, measured.null_std)
    negation = "" if beats_null(measured) else "not "
    deviations = "" if above is None else f" ({above:+z.1f})"
    return (
        f"{explained}; found on one half of the examples and measured on the other, "
        f"{percent(measured.cross_validated)}, "
        f"random balanced groups {percent(measured.null_mean)} "
        f"(standard deviation {percent(measured.null_std)}): {negation}more than "
        f"two standard deviations above chance{deviations}."
    )


def _few_splits(split: SplitManifest, measured: GroupCount) -> str:
    number = len(split.datasets)
    others = measured.null_splits
    exist = "exist" if measured.num_splits is not None else "were found"
    splits = f"{others + 1} balanced splits {exist}" if others else "no other balanced split exists"
    least = 1 / (others + 1)
    text = f"cannot be judged with {number} datasets: {splits}, p >= {least:.2g}"
    if not others:
        return text
    return f"{text} (it is better than {measured.null_beaten} of {others} others)"


def conflict_sentence(split: SplitManifest) -> str:
    """Counts the pairs of datasets that conflict, and those that surely do."""
    number = len(split.datasets)
    known = len(split.known_pairs)
    where = split.sketched_at
    pairs = number * (number - 1) // 2
    if not pairs:
        return "One dataset has none to conflict with."
    if not known:
        return (
            f"The cosine of no pair of datasets is resolved {where}: "
            "whether they conflict is not known."
        )
    which = (
        f"{known:,} pairs of datasets"
        if known == pairs
        else f"{known:,} resolved pairs of datasets (of {pairs:,})"
    )
    if split.negative_pair_fraction == 0:
        return f"None of the {which} conflicts {where}: no cosine of mean gradients is below 0."
    surely = f"{split.sure_conflicts:,} of them surely"
    if split.sure_conflicts and split.groups > 1:
        surely += f", {split.sure_conflicts_across:,} across groups"
    return (
        f"{percent(split.negative_pair_fraction)} of the {which} conflict {where} "
        f"(their mean gradients have a cosine below 0), "
        f"{percent(split.certain_negative_fraction)} by more than two standard errors; {surely}."
    )


def parting_sentence(split: SplitManifest) -> str:
    """Tells whether the split parts conflicts, on blocks that did not choose it; "" if unknown."""
    row = split.parting
    if row is None or row.parted_cosine is None or row.kept_cosine is None:
        return ""
    return (
        "On blocks of examples that did not choose the groups, the pairs that they part have a "
        f"mean cosine of {shown_cosine(row.parted_cosine, row.parted_error)}, "
        f"those that they keep {shown_cosine(row.kept_cosine)}."
    )


def mixture_sentence(split: SplitManifest) -> str:
    """Tells the mixture's noise scale and how far the suggested weights are; "" if unknown."""
    shares = [row.suggested_share for row in split.datasets]
    total = sum(row.num_target_tokens for row in split.datasets) or 1
    parts = []
    if split.noise_scale is not None and split.noise_scale_error is not None:
        parts.append(
            f"The gradient noise scale of the mixture is {split.noise_scale:,.0f} ± "
            f"{split.noise_scale_error:,.0f} examples: in a batch of that size noise and signal "
            "are equally large."
        )
    if len(shares) > 1 and all(share is not None for share in shares):
        moved = sum(
            max(0.0, (row.suggested_share or 0.0) - row.num_target_tokens / total)
            for row in split.datasets
        )
        parts.append(
            f"Weights under which one step helps all datasets alike move {percent(moved)} of the "
            "tokens (suggested_share in split.json)."
        )
    return " ".join(parts)


def structure_sentence(split: SplitManifest) -> str:
    """Explains that groups above chance are no conflict; "" where some pairs conflict."""
    if split.sure_conflicts or not beats_null(split.separation):
        return ""
    return (
        "Groups above chance hold datasets that are more alike than others; that is structure, not "
        "conflict. Merging then gains over the branches what training apart has cost them, not "
        "over joint training."
    )


def steps_sentence(steps: Sequence[int]) -> str:
    """Steps of the shortest branch against the number that a branch needs."""
    least = min(steps)
    if least >= FEW_STEPS:
        return f"The shortest branch takes {least:,} steps."
    return (
        f"The shortest branch takes {least:,} steps; below about {FEW_STEPS} a branch is far from "
        "converged."
    )


def balance_sentences(split: SplitManifest) -> tuple[str, ...]:
    """Names the tolerance that is not kept and the price of balance; empty if all is well."""
    note = (f"Balance: {split.note}.",) if split.note else ()
    price = balance_price(split)
    return (*note, price) if price else note


def balance_price(split: SplitManifest) -> str:
    """States the price of balance in separation; "" where it is nothing to speak of."""
    measured = split.separation
    eta = None if measured is None else measured.eta_squared
    if not split.unbalanced or measured is None or _same_groups(split):
        return ""
    parted = _parted_by_balance(split)
    below = eta is not None and measured.null_mean is not None and eta < measured.null_mean
    if not (parted or below or split.note):
        return ""
    parts = [parted] if parted else []
    if eta is not None and measured.null_mean is not None:
        parts.append(f"η² is {eta:.3f} against {measured.null_mean:.3f} of random splits")
    if split.unbalanced_eta_squared is not None:
        parts.append(f"without balance it is {split.unbalanced_eta_squared:.3f}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if parts else ""


def _same_groups(split: SplitManifest) -> bool:
    here = [row.group for row in split.datasets]
    pairs = set(zip(here, split.unbalanced, strict=True))
    return len(pairs) == len(set(here)) == len(set(split.unbalanced))


def _parted_by_balance(split: SplitManifest) -> str:
    """The most alike pair that only balance parts, if hardly a pair is more alike."""
    pairs = split.known_pairs
    parted = [
        (cosine, i, j)
        for i, j, cosine in pairs
        if split.datasets[i].group != split.datasets[j].group
        and split.unbalanced[i] == split.unbalanced[j]
    ]
    if not parted:
        return ""
    cosine, i, j = max(parted, key=lambda pair: pair[0])
    if cosine < _NEAR * max(cosine for _, _, cosine in pairs) or cosine <= 0:
        return ""
    names = f"{split.datasets[i].name} and {split.datasets[j].name}"
    return f"balance puts {names}, cosine {shown_cosine(cosine)}, into different groups"
