"""Packed rows: full, every example once an epoch, as many steps as without packing."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.architectures import make
from support.training import CONFIG, dataset, job, train

from merit_fast.data import Dataset, Example, collate, pack
from merit_fast.errors import InputError
from merit_fast.model import target_losses
from merit_fast.progress import SilentProgress
from merit_fast.train import TrainConfig
from merit_fast.train.packing import PackedSchedule, best_fit, split_rows
from merit_fast.train.schedule import num_steps
from merit_fast.train.stage import train_branch


def long_tailed(count, most, seed=0):
    lengths = np.random.default_rng(seed).lognormal(5, 1, count).astype(np.int64)
    return np.clip(lengths, 8, most)


@pytest.mark.parametrize("count,limit", [(1, 9), (50, 40), (3000, 2048)])
def test_best_fit_puts_every_example_into_one_row(count, limit):
    lengths = long_tailed(count, limit)
    rows = best_fit(lengths, limit)
    assert sorted(np.concatenate(rows).tolist()) == list(range(count))
    sums = np.array([lengths[row].sum() for row in rows])
    assert sums.max() <= limit
    assert sorted(sums)[: len(sums) // 2 and 2] != [] and sum(sorted(sums)[:2]) > limit or count < 2


def test_best_fit_takes_the_fullest_row_with_room():
    # 7 and 6 open rows with 3 and 4 tokens left; 3 fills the first, 4 the second
    assert [row.tolist() for row in best_fit(np.array([3, 7, 4, 6]), 10)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("row_length,batch_size", [(2048, 64), (1024, 256)])
def test_rows_of_a_long_tailed_mixture_are_full(row_length, batch_size):
    lengths = long_tailed(6000, row_length)
    schedule = PackedSchedule(lengths, TrainConfig(batch_size=batch_size), row_length)
    assert schedule.limit == row_length
    rows = [row for step in range(schedule.steps_per_epoch) for row in schedule.rows(step)]
    assert lengths.sum() / (row_length * len(rows)) >= 0.97


@pytest.mark.parametrize("batch_size", [1, 3, 16, 500])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("row_length", [None, 64, 600])
def test_every_example_comes_once_an_epoch(batch_size, accumulation, row_length):
    lengths = long_tailed(400, 64)
    config = TrainConfig(batch_size=batch_size, accumulation=accumulation, epochs=2, seed=5)
    schedule = PackedSchedule(lengths, config, row_length)
    steps = num_steps(len(lengths), config)
    seen = []
    by_step = []
    for step in range(steps):
        rows = schedule.rows(step)
        assert rows and all(len(row) for row in rows)
        assert max(lengths[row].sum() for row in rows) <= max(row_length or 10**9, lengths.max())
        seen += [int(i) for row in rows for i in row]
        by_step.append(sum(int(lengths[row].sum()) for row in rows))
    assert sorted(seen[:400]) == sorted(seen[400:]) == list(range(400))
    assert seen[:400] != seen[400:]
    for stop in (0, 1, steps // 2 + 1, steps):
        assert schedule.count_tokens(stop) == sum(by_step[:stop])
    # a resumed run sees the same rows
    again = PackedSchedule(lengths, config, row_length).rows(steps - 1)
    assert [row.tolist() for row in again] == [row.tolist() for row in schedule.rows(steps - 1)]
    if accumulation > 1 and batch_size == 500:
        assert len(schedule.rows(0)) >= accumulation


def test_rows_are_split_until_there_is_one_for_every_step():
    rows = split_rows([np.arange(5), np.arange(5, 7)], 6)
    assert len(rows) == 6 and sorted(np.concatenate(rows).tolist()) == list(range(7))
    assert sorted(map(len, rows)) == [1, 1, 1, 1, 1, 2]


def test_losses_in_best_fit_rows_are_those_of_single_rows():
    model = make("qwen2").eval()
    generator = np.random.default_rng(0)
    examples = [
        Example(ids, ids) for ids in (generator.integers(3, 131, n).astype(np.int32)
                                      for n in generator.integers(2, 30, 25))
    ]  # fmt: skip
    lengths = np.array([len(example.input_ids) for example in examples])
    with torch.no_grad():
        for row in best_fit(lengths, 60):
            packed = target_losses(model, pack([examples[i] for i in row], [0] * len(row)))
            for place, i in enumerate(row):
                single = target_losses(model, collate([examples[i]], [0], 0)).loss
                torch.testing.assert_close(packed.loss[packed.example == place], single)


def test_a_run_killed_in_the_middle_ends_with_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    config = replace(CONFIG, packing=True, checkpoint_steps=2)
    work = replace(job(tiny_model, dataset("a", 0, 17), dataset("b", 1, 9)), row_length=24)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    train_branch(work, config, whole, SilentProgress())
    from merit_fast.train import loop

    plain = loop.train_step

    def stops(*args):
        position, record = plain(*args)
        if position.step == 7:
            raise KeyboardInterrupt
        return position, record

    monkeypatch.setattr(loop, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        train_branch(work, config, parts, SilentProgress())
    monkeypatch.undo()
    train_branch(work, config, parts, SilentProgress())
    for name in ("losses.json", "branch.json", *[f.name for f in whole.glob("model*")]):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_packed_training_sees_as_many_examples_tokens_and_steps(tiny_model, tmp_path, kernels):
    found = {}
    for packing in (False, True):
        config = replace(CONFIG, packing=packing, kernels=kernels)
        rows = dataset("a", 0), dataset("b", 1, rows=3)
        manifest = train(tiny_model, tmp_path / str(packing), config, *rows)
        losses = json.loads((tmp_path / str(packing) / "losses.json").read_text())
        found[packing] = manifest, np.mean(losses)
    assert found[True][0] == found[False][0]
    assert found[True][1] == pytest.approx(found[False][1], rel=0.05)


def test_rows_with_images_are_refused_before_training(tiny_model, tmp_path):
    ids = np.arange(5, 10, dtype=np.int32)
    image = SimpleNamespace(token_types=np.array([0, 1, 0, 0, 0], np.int8))
    odd = Example(ids, ids, media=image)
    rows = dataset("a", 0), Dataset("b", (odd, odd))
    with pytest.raises(InputError, match="train.packing: must be false for dataset b: its rows ho"):
        train(tiny_model, tmp_path / "out", replace(CONFIG, packing=True), *rows)


def test_packed_rows_hold_no_images():
    media = SimpleNamespace(token_types=np.array([0, 1], np.int8))
    example = Example(np.array([1, 2]), np.array([1, 2]), media=media)
    with pytest.raises(ValueError, match="pack: examples must be text"):
        pack([example], [0])
