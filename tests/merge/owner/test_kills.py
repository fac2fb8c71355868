"""A merge that is killed at any moment, alone or as one of several, ends in the same bytes."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from support.checks import tree_bytes
from support.merge.merges import write

from merit_fast.merge import merge_models

pytestmark = pytest.mark.process
FORK = multiprocessing.get_context("fork")
OPTIONS = dict(method="ties", density=0.5, shard_size="30K", stats=True, checksum=True)
SAME = ("stage.json", "README.md")  # the card and the config name the output


@pytest.fixture
def root(tmp_path):
    for name in ("base", "m0", "m1"):
        write(tmp_path / name, {f"layers.{i}.w": torch.randn(31, 53 + 7 * i) for i in range(9)})
    return tmp_path


def merge(root, name="out", share=(1, 1)):
    models = [root / "m0", root / "m1"]
    return merge_models(models, [1, 1], root / "base", out=root / name, share=share, **OPTIONS)


def start(root, share=(1, 1)):
    process = FORK.Process(target=merge, args=(root, "out", share))
    process.start()
    return process


def kill_after(process, seconds):
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()


@pytest.mark.parametrize("seed", [0, 1])
def test_kills_at_random_moments_cost_work_and_no_byte(root, seed):
    rng = random.Random(seed)
    started = time.perf_counter()
    merge(root, "fresh")
    seconds = time.perf_counter() - started
    for _ in range(12):
        kill_after(start(root), rng.uniform(0, 1.2 * seconds))
        out = root / "out"
        if out.exists():  # complete, since it has its name
            assert tree_bytes(out, SAME) == tree_bytes(root / "fresh", SAME)
    assert merge(root)["finished"]
    assert tree_bytes(root / "out", SAME) == tree_bytes(root / "fresh", SAME)
    assert sorted(path.name for path in root.iterdir()) == ["base", "fresh", "m0", "m1", "out"]


def test_of_three_shares_one_is_killed_and_only_its_files_are_missing(root):
    merge(root, "fresh")
    files = sorted(file.name for file in (root / "fresh").glob("*.safetensors"))
    processes = [start(root, (i, 3)) for i in (1, 3)]
    stopped = start(root, (2, 3))
    kill_after(stopped, 0)
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert stopped.exitcode == -signal.SIGKILL and not (root / "out").exists()
    present = {file.name for file in (root / "out.tmp").glob("*.safetensors")}
    assert present == {name for i, name in enumerate(files) if i % 3 != 1}
    assert merge(root, share=(2, 3))["finished"]
    assert tree_bytes(root / "out", SAME) == tree_bytes(root / "fresh", SAME)


def test_many_equal_merges_at_once_are_one(root):
    merge(root, "fresh")
    processes = [start(root) for _ in range(5)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert tree_bytes(root / "out", SAME) == tree_bytes(root / "fresh", SAME)
    assert sorted(path.name for path in root.iterdir()) == ["base", "fresh", "m0", "m1", "out"]
