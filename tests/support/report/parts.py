"""Splits with conflicts per part of the model, for the tests of the report."""

from dataclasses import replace

from support.report.manifests import make_split

from merit_fast.manifests.schemas import PartConflict, SplitManifest


def with_parts(split: SplitManifest, *names: str) -> SplitManifest:
    """The split with other cosines in every part of the model."""
    parts = {}
    for seed, name in enumerate(names, 1):
        number = len(split.datasets)
        other = make_split(number, split.groups, seed=seed, unresolved=seed % 2)
        parts[name] = PartConflict(
            similarity=other.similarity,
            similarity_errors=other.similarity_errors,
            norm_shares=(None, *(0.125 * seed,) * (number - 1)),
            negative_pair_fraction=other.negative_pair_fraction,
            certain_negative_fraction=other.certain_negative_fraction,
            within_cosine=other.within_cosine,
            across_cosine=other.across_cosine,
            sure_conflicts=2 * seed,
            sure_conflicts_across=seed,
        )
    return replace(split, parts=parts)
