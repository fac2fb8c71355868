"""Rows that branches share (``train.mix``) and their steps (``train.budget``), without training."""

from dataclasses import replace

import pytest

from merit_fast.data import Dataset
from merit_fast.data.shares import mixed_rows
from merit_fast.errors import InputError
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import SplitManifest
from merit_fast.pipeline.arms import merit_steps, plan_branches, split_branch_steps
from merit_fast.pipeline.config import read_run_config
from merit_fast.train.config import TrainConfig


def dataset(rows=37, name="d"):
    return Dataset(name, tuple(range(rows)))  # rows stand for themselves


def test_mixed_rows_are_a_share_and_other_rows_for_each_branch():
    shares = [mixed_rows(dataset(), 0.2, k, 4, seed=1, key="x").examples for k in range(4)]
    assert [len(share) for share in shares] == [7] * 4
    assert len({row for share in shares for row in share}) == 28  # no row twice
    again = mixed_rows(dataset(), 0.2, 2, 4, seed=1, key="x").examples
    assert again == shares[2] and list(again) == sorted(again)
    assert mixed_rows(dataset(), 0.2, 2, 4, seed=2, key="x").examples != shares[2]


def test_more_rows_than_there_are_begin_again_without_a_repetition_in_one_branch():
    for k in range(3):
        chosen = mixed_rows(dataset(10), 0.7, k, 3, seed=0, key="x").examples
        assert len(set(chosen)) == 7


@pytest.fixture
def planned(finished_run, tmp_path, monkeypatch):
    """A function: options of train -> (config, split, contents) of the finished run."""
    split = read_manifest(SplitManifest, finished_run.out / "split" / "split.json")
    monkeypatch.chdir(finished_run.out.parent)
    config = read_run_config(finished_run.out / "split" / "config.yml")
    contents = {row.name: f"content of {row.name}" for row in split.datasets}

    def plan(**options):
        return replace(config, train=replace(config.train, **options)), split, contents

    return plan


def test_a_mix_gives_every_branch_a_share_of_every_other_group(planned):
    config, split, contents = planned(mix=0.25)
    counts = {row.name: row.num_examples for row in split.datasets}
    groups = split.group_of("merit")
    branches = [b for b in plan_branches(config, split, contents) if b.arm == "merit"]
    for branch in branches:
        assert set(branch.datasets) == set(contents)
        for rows in branch.rows:
            whole = counts[rows.dataset]
            own = groups[rows.dataset] == branch.group
            assert rows.count(whole, config.split) == (whole if own else round(0.25 * whole))
    plain, *_ = planned()
    without = [b for b in plan_branches(plain, split, contents) if b.arm == "merit"]
    assert all(
        a.content(config.split) != b.content(config.split)
        for a, b in zip(branches, without, strict=True)
    )


def test_equal_steps_share_the_steps_of_the_epochs(planned):
    config, split, contents = planned(budget="equal-steps", epochs=5)
    by_epochs, *_ = planned(epochs=5)
    steps = merit_steps(by_epochs, split, contents)
    assert merit_steps(config, split, contents) == [-(-sum(steps) // len(steps))] * len(steps)


def test_equal_tokens_give_the_smaller_group_more_steps_for_a_row(planned):
    config, split, contents = planned(budget="equal-tokens", epochs=400)
    uneven = tuple(
        replace(row, num_target_tokens=row.num_target_tokens * (5 if row.group == 0 else 1))
        for row in split.datasets
    )
    split = replace(split, datasets=uneven)
    by_epochs, *_ = planned(epochs=400)
    before = merit_steps(by_epochs, split, contents)
    steps = merit_steps(config, split, contents)
    tokens = [
        sum(row.num_target_tokens for row in uneven if row.group == group) for group in (0, 1)
    ]
    seen = [s / b * t for s, b, t in zip(steps, before, tokens, strict=True)]
    assert seen[0] == pytest.approx(seen[1], rel=0.02)
    for branch in plan_branches(config, split, contents):
        if branch.arm == "merit":
            assert split_branch_steps(branch, config, split) == branch.steps


@pytest.mark.parametrize("mix", [-0.1, 1.0])
def test_a_mix_out_of_range_is_refused(mix):
    with pytest.raises(InputError, match="mix: must be from 0 to below 1"):
        TrainConfig(mix=mix)
