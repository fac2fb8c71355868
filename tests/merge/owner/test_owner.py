"""One merge owns its output from the first byte to the last one: real processes, real kills."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch
from support.checks import tree_bytes
from support.merge.merges import write
from support.paths import HELD_MERGE

from merit_fast.errors import InputError
from merit_fast.manifests.locks import locks_of, owners
from merit_fast.merge import MergeConfig, merge_models
from merit_fast.progress import SilentProgress

pytestmark = pytest.mark.process
FILES = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
TIES = ["--method=ties", "--density=0.5"]


class Notes(SilentProgress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def root(tmp_path):
    for name in ("base", "m0", "m1"):
        tensors = {f"layers.{i}.w": torch.randn(30, 50 + 7 * i) for i in range(8)}
        write(tmp_path / name, tensors)
        (tmp_path / name / "tokenizer.json").write_text("{}")
    return tmp_path


def words(root, *options):
    models = [f"--model={root / name}" for name in ("m0", "m1")]
    base = [f"--base={root / 'base'}"] if "--method=ties" in options else []
    return [str(root / "out"), *models, *base, "--weights=uniform", "--shard-size=25K", *options]


def start(root, stop, *options):
    command = [sys.executable, str(HELD_MERGE), str(root), stop, "merge", *words(root, *options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def held(root, stop, *options):
    """A merge that waits before it gives its first file the name that ends in ``stop``."""
    process = start(root, stop, *options)
    wait_for(lambda: (root / "reached").exists(), process)
    return process


def wait_for(condition, process):
    limit = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)


def end(process):
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


def here(root, name="out", progress=None, **options):
    config = MergeConfig(weights="uniform", shard_size="25K", **options)
    models = [root / "m0", root / "m1"]
    base = root / "base" if options.get("method") == "ties" else None
    return merge_models(models, base=base, out=root / name, config=config, progress=progress)


def test_a_second_merge_with_another_method_is_told_who_works_and_changes_nothing(root):
    first = held(root, FILES[1], *TIES)
    before = {file.name: file.stat().st_ino for file in (root / "out.tmp").iterdir()}
    code, _, errors = end(start(root, "-"))
    assert code == 2 and len(errors.strip().splitlines()) == 1
    pattern = rf"out: process {first.pid} \(.*merge .*, since \d\d:\d\d\) works here with another"
    assert re.search(pattern, errors)
    after = {file.name: file.stat().st_ino for file in (root / "out.tmp").iterdir()}
    assert before.items() <= after.items()  # the first one writes more parts meanwhile
    assert all(f"-{first.pid}.part" in name for name in after.keys() - before.keys())
    (root / "go").touch()
    assert end(first)[0] == 0
    here(root, "fresh", method="ties", density=0.5)
    assert tree_bytes(root / "out", ("stage.json", "README.md")) == tree_bytes(
        root / "fresh", ("stage.json", "README.md")
    )


@pytest.mark.parametrize("stop", [FILES[0], "index.json"])
def test_two_equal_merges_write_no_file_twice(root, stop):
    first = held(root, stop)
    second = start(root, "-")
    if stop == FILES[0]:
        wait_for(lambda: (root / "log").read_text().count("\n") == 4, second)
    (root / "go").touch()
    assert end(first)[0] == 0 and end(second)[0] == 0
    assert sorted((root / "log").read_text().split()) == FILES
    here(root, "fresh")
    names = ("stage.json", "README.md")
    assert tree_bytes(root / "out", names) == tree_bytes(root / "fresh", names)
    assert not (root / "out.tmp").exists() and not (root / ".out.locks").exists()


def test_a_waiting_merge_takes_over_the_file_of_a_killed_one(root):
    first = held(root, FILES[0])
    second = start(root, "-")
    wait_for(lambda: len(owners(locks_of(root / "out"))) == 2, second)
    first.kill()
    first.wait()
    assert end(second)[0] == 0
    assert set((root / "log").read_text().split()) == set(FILES)
    assert not [name for name in os.listdir(root / "out") if name.endswith((".part", ".tmp"))]
    here(root, "fresh")
    names = ("stage.json", "README.md")
    assert tree_bytes(root / "out", names) == tree_bytes(root / "fresh", names)


def test_an_input_that_changes_while_it_is_read_ends_the_merge(root):
    first = held(root, FILES[0])
    with open(root / "m1/model.safetensors", "r+b") as file:
        file.seek(-200, os.SEEK_END)
        file.write(bytes(100))
    (root / "go").touch()
    code, _, errors = end(first)
    assert code == 2 and "m1: changed while the merge read it" in errors
    assert not (root / "out").exists()


# ---- resume
@pytest.fixture
def killed(root):
    """A merge that was killed before it named its fourth file."""
    process = held(root, FILES[3])
    process.kill()
    process.wait()
    return root


def test_a_kept_file_that_was_damaged_is_made_again_and_told(killed):
    file = killed / "out.tmp" / FILES[1]
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(content)
    os.utime(file, ns=times)
    inode = (killed / "out.tmp" / FILES[0]).stat().st_ino
    progress = Notes()
    here(killed, progress=progress)
    assert [note for note in progress.notes if f"{FILES[1]}: is not as it was written" in note]
    assert (killed / "out" / FILES[0]).stat().st_ino == inode
    here(killed, "fresh")
    assert tree_bytes(killed / "out", ("stage.json",)) == tree_bytes(
        killed / "fresh", ("stage.json",)
    )


def test_a_hundred_bytes_of_an_input_changed_before_the_resume_count(killed):
    file = killed / "m0/model.safetensors"
    content = bytearray(file.read_bytes())
    assert len(content) < 1 << 20  # by content
    content[5000:5100] = bytes(100)
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(content)
    os.utime(file, ns=times)
    here(killed)
    here(killed, "fresh")
    assert tree_bytes(killed / "out") == tree_bytes(killed / "fresh")


def test_a_large_input_counts_by_a_time_that_nobody_can_set(tmp_path):
    for name in ("m0", "m1"):
        write(tmp_path / name, {"w": torch.randn(700, 500)})
    models = [tmp_path / "m0", tmp_path / "m1"]
    merge_models(models, [1, 1], out=tmp_path / "out")
    file = tmp_path / "m0/model.safetensors"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    with open(file, "r+b") as opened:
        opened.seek(700_000)
        opened.write(bytes(100))
    os.utime(file, ns=times)
    merge_models(models, [1, 1], out=tmp_path / "out")
    merge_models(models, [1, 1], out=tmp_path / "fresh")
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "fresh")


# ---- finished outputs
def test_a_finished_output_is_up_to_date_only_with_all_its_bytes(root):
    here(root)
    inode = (root / "out").stat().st_ino
    progress = Notes()
    here(root, progress=progress)
    assert progress.notes == [f"{root / 'out'}: up to date"]
    assert (root / "out").stat().st_ino == inode
    whole = tree_bytes(root / "out")
    file = root / "out" / FILES[2]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    progress = Notes()
    here(root, progress=progress)
    assert progress.notes == [f"{file}: has other content; merging again"]
    assert tree_bytes(root / "out") == whole


def test_another_tokenizer_counts_as_another_input(root):
    here(root)
    (root / "m0/tokenizer.json").write_text('{"a": 1}')
    here(root)
    assert (root / "out/tokenizer.json").read_text() == '{"a": 1}'


def test_an_output_directory_is_not_emptied_under_a_live_process(root):
    from merit_fast.manifests.directories import begin_directory

    first = held(root, FILES[0])
    with pytest.raises(InputError, match=f"process {first.pid} .* works here with another config"):
        begin_directory(root / "out", "another fingerprint")
    (root / "go").touch()
    assert end(first)[0] == 0
