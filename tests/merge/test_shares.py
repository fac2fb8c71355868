"""Merges by several processes, interrupted merges, checksums, memory: always the same bytes."""

import json
import multiprocessing
import os
import re
import subprocess
import sys

import pytest
import torch
from support.checks import tree_bytes
from support.merge.merges import load, write

from merit_fast.cli.main import main
from merit_fast.errors import InputError
from merit_fast.manifests.hashes import checksum
from merit_fast.merge import MergeConfig, merge_models
from merit_fast.merge.write.verified import verify_checksums

OPTIONS = dict(
    method="ties", density=0.5, weights="uniform", shard_size="20K", checksum=True, stats=True
)
SCRIPT = """
import os, signal, sys
from pathlib import Path
from merit_fast.merge import MergeConfig, merge_models
from merit_fast.progress import SilentProgress
root, i, n, kill_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
replace = os.replace
def killing(source, target):
    if kill_at and str(target).endswith(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killing
models = [root / f"m{{k}}" for k in range(2)]
print(merge_models(models, base=root / "base", out=root / "out", share=(i, n),
                   **{options!r})["finished"])
"""


def start(root, i=1, n=1, kill_at="", **options):
    script = SCRIPT.format(options=OPTIONS | options)
    command = [sys.executable, "-c", script, str(root), str(i), str(n), kill_at]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return out.strip() == "True"


def here(root, name="out", i=1, n=1, **options):
    config = MergeConfig(**OPTIONS | options)
    models = [root / f"m{k}" for k in range(2)]
    return merge_models(models, base=root / "base", out=root / name, config=config, share=(i, n))


@pytest.fixture
def root(tmp_path):
    for name in ("base", "m0", "m1"):
        tensors = {f"layers.{i}.w": torch.randn(30, 50 + 7 * i) for i in range(8)}
        write(tmp_path / name, tensors | {"ids": torch.arange(5)})
        (tmp_path / name / "tokenizer.json").write_text("{}")
    return tmp_path


@pytest.fixture
def whole(root):
    """Output of one process, in several files."""
    here(root, "whole")
    files = tree_bytes(root / "whole")
    assert len([file for file in files if file.endswith(".safetensors")]) >= 4
    assert {"geometry.json", "model.safetensors.index.json", "tokenizer.json", "stage.json"} < set(
        files
    )
    assert not [
        file
        for file in files
        if "tmp" in file or "lock" in file or "xxh3" in file or "gram" in file
    ]
    return files


@pytest.mark.parametrize("flag", ["--share", "--shard"])
def test_the_command_takes_a_share_by_its_name_and_by_the_earlier_one(root, flag, monkeypatch):
    models = [f"--model={root / 'm0'}", f"--model={root / 'm1'}", "--weights=uniform"]
    words = ["merge", str(root / "out"), *models, "--shard-size=40K", "--json"]
    monkeypatch.setattr(sys, "argv", ["merit-fast", *words, flag, "1/2"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    parts = list((root / "out.tmp").glob("*.safetensors"))
    monkeypatch.setattr(sys, "argv", ["merit-fast", *words, flag, "2/2"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert 0 < len(parts) < len(list((root / "out").glob("*.safetensors")))


def test_shares_one_after_the_other_are_one_merge(root, whole):
    for i in (3, 1):
        assert here(root, i=i, n=3)["finished"] is False and not (root / "out").exists()
    assert len(list((root / "out.tmp").glob("*.safetensors"))) < len(
        list((root / "whole").glob("*.safetensors"))
    )
    assert here(root, i=2, n=3)["finished"] is True  # whoever is last finishes
    assert tree_bytes(root / "out") == whole and not (root / "out.tmp").exists()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_at_once_are_one_merge(root, whole, count):
    processes = [start(root, i + 1, count) for i in range(count)]
    assert any([finish(process) for process in processes])
    assert tree_bytes(root / "out") == whole and not (root / "out.tmp").exists()


def test_more_processes_than_files(root, whole):
    for i in range(20, 0, -1):
        result = here(root, i=i, n=20)
    assert result["finished"] and tree_bytes(root / "out") == whole


@pytest.mark.parametrize("share", [(0, 2), (3, 2), (1, 0)])
def test_a_share_that_is_none_is_refused(root, share):
    with pytest.raises(
        InputError, match=re.escape(f"must be 1 to n of n, got {share[0]}/{share[1]}")
    ):
        here(root, i=share[0], n=share[1])
    assert not (root / "out.tmp").exists()


@pytest.mark.parametrize(
    "kill_at",
    [
        "model-00001-of-00005.safetensors",
        "model-00004-of-00005.safetensors",
        "geometry.json",
        "index.json",
        "stage.json",
    ],
)
def test_a_killed_merge_goes_on_to_the_same_bytes(root, whole, kill_at):
    process = start(root, kill_at=kill_at)
    process.communicate(timeout=60)
    assert process.returncode == -9 and not (root / "out").exists()
    done = {f: f.stat().st_mtime_ns for f in (root / "out.tmp").glob("*.safetensors")}
    inodes = {f.name: f.stat().st_ino for f in done}
    assert finish(start(root))
    assert tree_bytes(root / "out") == whole
    assert {
        name: (root / "out" / name).stat().st_ino for name in inodes
    } == inodes  # finished files are kept


def test_a_killed_share_is_taken_up_by_its_next_try(root, whole):
    process = start(root, 1, 2, "model-00003-of-00005.safetensors")
    process.communicate(timeout=60)
    assert process.returncode == -9
    assert not finish(start(root, 2, 2))
    assert finish(start(root, 1, 2))
    assert tree_bytes(root / "out") == whole


def test_another_merge_does_not_go_on_where_one_was_killed(root):
    start(root, kill_at="model-00004-of-00005.safetensors").communicate(timeout=60)
    here(root, scale=0.5)
    here(root, "fresh", scale=0.5)
    assert tree_bytes(root / "out", ("stage.json",)) == tree_bytes(root / "fresh", ("stage.json",))


def test_what_changes_no_byte_does_not_start_anew(root, whole):
    start(root, kill_at="model-00004-of-00005.safetensors").communicate(timeout=60)
    inodes = {f.name: f.stat().st_ino for f in (root / "out.tmp").glob("*.safetensors")}
    assert len(inodes) == 3
    here(root, threads=5, chunk_kib=4, max_memory="64M", fsync=False)
    assert {name: (root / "out" / name).stat().st_ino for name in inodes} == inodes
    assert tree_bytes(root / "out") == whole


# ---- checksums
def test_checksums_are_in_the_index_and_find_one_flipped_bit(root, whole):
    index = json.loads((root / "whole/model.safetensors.index.json").read_text())
    sums = verify_checksums(root / "whole")
    assert sums == index["metadata"]["xxh3_128"] and sorted(sums) == sorted(
        set(index["weight_map"].values())
    )
    assert sums == {name: checksum(root / "whole" / name) for name in sums}
    file = root / "whole/model-00002-of-00005.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    with pytest.raises(
        InputError, match="00002-of-00005.safetensors: xxh3_128 must be .* as in the index, got"
    ):
        verify_checksums(root / "whole")
    file.unlink()
    with pytest.raises(
        InputError, match="00002-of-00005.safetensors: is absent, the index has its checksum"
    ):
        verify_checksums(root / "whole")


def test_a_single_file_with_a_checksum_has_an_index_and_one_without_is_told(root):
    here(root, "single", shard_size=None)
    assert list(verify_checksums(root / "single")) == ["model.safetensors"]
    here(root, "plain", shard_size=None, checksum=False)
    with pytest.raises(
        InputError, match="metadata.xxh3_128: is absent; merge with --checksum writes it"
    ):
        verify_checksums(root / "plain")


def test_checksums_are_xxh3s(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert (
        checksum(tmp_path / "empty") == "99aa06d3014798d86001c324468d497f"
    )  # published for seed 0


# ---- fsync, memory
def test_fsync_is_asked_for_every_file_unless_it_is_off(root, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd)
    )
    here(root, "off", fsync=False)
    assert not [name for name in synced if name.endswith((".part", ".safetensors"))]
    here(root, "on")
    parts = {name for name in synced if name.endswith(".part")}
    assert len(parts) == len(list((root / "on").glob("*.safetensors")))
    assert tree_bytes(root / "on", ("stage.json",)) == tree_bytes(root / "off", ("stage.json",))


def test_max_memory_makes_chunks_small_and_changes_no_byte(root, whole):
    config = MergeConfig(
        **OPTIONS | dict(stats=False, max_memory="200K", threads=2, chunk_kib=1024)
    )
    models = [root / f"m{k}" for k in range(2)]
    plan = merge_models(models, base=root / "base", out=root / "small", config=config)
    assert plan["buffer_bytes"] <= 200 << 10
    assert load(root / "small").keys() == load(root / "whole").keys()
    for file in (root / "small").glob("*.safetensors"):
        assert file.read_bytes() == (root / "whole" / file.name).read_bytes()
    with pytest.raises(
        InputError,
        match=r"max_memory: must be at least \d+ bytes for method \w+, 2 threads and 3 inputs",
    ):
        here(root, max_memory="10K")


def begin(path, barrier, results):
    from merit_fast.manifests.directories import begin_directory

    barrier.wait()
    try:
        directory = begin_directory(path, "f")
        results.put((directory / "mine").exists())
        (directory / "mine").touch()
    except Exception as error:
        results.put(error)


@pytest.mark.parametrize("stale", [False, True])
def test_processes_that_begin_at_once_share_the_directory(tmp_path, stale):
    context = multiprocessing.get_context("fork")
    for number in range(10):
        path = tmp_path / f"{number}" / "out"
        if stale:  # what another merge left
            (path.with_name("out.tmp")).mkdir(parents=True)
            (path.with_name("out.tmp") / "fingerprint").write_text("another")
        barrier = context.Barrier(4)
        results = context.Queue()
        processes = [context.Process(target=begin, args=(path, barrier, results)) for _ in range(4)]
        for process in processes:
            process.start()
        answers = [results.get(timeout=30) for _ in processes]
        for process in processes:
            process.join()
        assert not [error for error in answers if isinstance(error, Exception)]
        assert sorted(file.name for file in path.parent.iterdir()) == ["out.tmp"]
        assert (path.with_name("out.tmp") / "mine").exists()
