"""Conflicts per part of the model: planted in one part, hidden in the whole."""

from dataclasses import replace

import numpy as np
import pytest
from support.split.block_sums import measure_conflict, sample, unit
from support.split.stages import split_sums

from merit_fast.errors import InputError
from merit_fast.split import SplitConfig

PARTS = {"attention": "a", "mlp": "b"}


def planted(seed=0, number=4, width=600):
    """Sums [N, G, D] of two parts with columns of their own, and counts.

    In attention the datasets pull in two opposite directions; in mlp, thrice as long, all agree.
    """
    generator = np.random.default_rng(seed)
    signs = np.where(np.arange(number) % 2, 1.0, -1.0)[:, None]
    attention = np.zeros((number, width))
    attention[:, :300] = signs * unit(generator.standard_normal((1, 300)))
    attention[:, :300] += 0.3 * unit(generator.standard_normal((number, 300)))
    mlp = np.zeros((number, width))
    mlp[:, 300:] = 3 * unit(generator.standard_normal((1, 300)))
    mlp[:, 300:] += 0.3 * unit(generator.standard_normal((number, 300)))
    of_attention, counts = sample(attention, 64, 2.0, generator)
    of_mlp, _ = sample(mlp, 64, 2.0, generator)
    of_attention[:, :, 300:] = 0
    of_mlp[:, :, :300] = 0
    return {"attention": of_attention, "mlp": of_mlp}, counts


def test_a_conflict_of_one_part_shows_there_though_the_whole_agrees():
    parts, counts = planted()
    config = SplitConfig(groups=2, parts=PARTS)
    split = split_sums(sum(parts.values()), counts, config, parts=parts)
    assert split.sure_conflicts == 0 and split.negative_pair_fraction == 0
    attention, mlp = split.parts["attention"], split.parts["mlp"]
    assert list(split.parts) == list(PARTS)
    assert attention.sure_conflicts == 4 and attention.negative_pair_fraction == 4 / 6
    assert attention.sure_conflicts_across == 4  # the groups found in the whole part them
    assert mlp.sure_conflicts == mlp.sure_conflicts_across == 0
    assert attention.across_cosine < -0.8 < 0.8 < attention.within_cosine
    for name, part in split.parts.items():
        exact = measure_conflict(parts[name], counts, debias="blocks")
        np.testing.assert_allclose(part.similarity, exact.cosine, rtol=1e-6)
        np.testing.assert_allclose(part.similarity_errors, exact.error, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"preset": "paper"}, {"similarity": "gram"}])
def test_shares_and_cosines_of_the_parts_explain_those_of_the_whole(options):
    """cos = sum over parts of sqrt(share_i share_j) cos_part, where the parts share no column."""
    parts, counts = planted(seed=3)
    config = SplitConfig(groups=2, parts=PARTS, **options)
    split = split_sums(sum(parts.values()), counts, config, parts=parts)
    shares = {name: np.array(part.norm_shares) for name, part in split.parts.items()}
    np.testing.assert_allclose(sum(shares.values()), 1, rtol=1e-6)
    assert (shares["mlp"] > 0.8).all()
    summed = sum(
        np.sqrt(np.outer(shares[name], shares[name])) * np.array(part.similarity)
        for name, part in split.parts.items()
    )
    off = ~np.eye(len(summed), dtype=bool)
    np.testing.assert_allclose(summed[off], np.array(split.similarity)[off], rtol=1e-6)


def test_parts_change_nothing_else_in_split_json():
    parts, counts = planted(seed=1)
    whole = sum(parts.values())
    plain = split_sums(whole, counts, SplitConfig(groups=2))
    split = split_sums(whole, counts, SplitConfig(groups=2, parts=PARTS), parts=parts)
    assert plain.parts == {} and replace(split, parts={}) == plain


def test_a_part_without_a_resolved_gradient_has_no_cosines():
    parts, counts = planted(seed=2)
    noise = np.random.default_rng(0).standard_normal(parts["mlp"].shape)
    parts = {**parts, "mlp": noise}
    split = split_sums(sum(parts.values()), counts, SplitConfig(groups=2, parts=PARTS), parts=parts)
    cosines = np.array(split.parts["mlp"].similarity, float)
    assert np.isnan(cosines).mean() > 0.5


def test_a_part_that_was_not_sketched_is_named():
    parts, counts = planted()
    with pytest.raises(InputError, match="parts/mlp/d00.safetensors: is not a sketch state"):
        split_sums(
            sum(parts.values()),
            counts,
            SplitConfig(groups=2, parts=PARTS),
            parts={"attention": parts["attention"]},
        )


@pytest.mark.filterwarnings("error")
def test_a_part_that_no_gradient_reached_is_not_resolved_and_has_no_share():
    parts, counts = planted()
    parts = {**parts, "tower": np.zeros_like(parts["mlp"])}
    config = SplitConfig(groups=2, parts={**PARTS, "tower": "c"})
    split = split_sums(sum(parts.values()), counts, config, parts=parts)
    tower = split.parts["tower"]
    assert set(tower.norm_shares) == {0.0} and tower.sure_conflicts == 0
    assert tower.within_cosine is None and tower.across_cosine is None
    assert {cosine for row in tower.similarity for cosine in row} == {None}
