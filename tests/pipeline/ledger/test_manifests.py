"""The files in which stages meet: complete or absent, checked when read, always the same bytes."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from merit_fast.errors import InputError
from merit_fast.manifests import directories
from merit_fast.manifests.atomic import replace_file, write_bytes, write_text
from merit_fast.manifests.directories import is_complete, output_directory, recover_directory
from merit_fast.manifests.io import (
    StageManifest,
    fingerprint,
    read_manifest,
    stage_manifest,
    write_manifest,
)
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.options.parser import to_plain
from merit_fast.split.config import SplitConfig
from merit_fast.train.config import TrainConfig

MANIFEST = BranchManifest("merit-0", "merit", 0, ("a", "b"), 10, 100, 500, 5, 0, "f", "f")


def test_manifest_round_trip_and_same_bytes(tmp_path):
    write_manifest(MANIFEST, tmp_path / "branch.json")
    first = (tmp_path / "branch.json").read_bytes()
    assert read_manifest(BranchManifest, tmp_path / "branch.json") == MANIFEST
    write_manifest(MANIFEST, tmp_path / "branch.json")
    assert (tmp_path / "branch.json").read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["branch.json"]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"steps": "many"}, "steps: must be an integer"),
        ({"schema_version": 99}, "schema_version: must be 3, got 99"),
        ({"stepz": 1}, "stepz: unknown key; did you mean steps"),
    ],
)
def test_damaged_manifests_are_named(tmp_path, change, message):
    file = tmp_path / "branch.json"
    file.write_text(json.dumps({**to_plain(MANIFEST), **change}))
    with pytest.raises(InputError, match=f"branch.json: {message}"):
        read_manifest(BranchManifest, file)
    file.write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        read_manifest(BranchManifest, file)


def test_fingerprint_depends_on_content_only():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    first, other = (stage_manifest("train", TrainConfig(seed=s), {"base": "x"}) for s in (0, 1))
    again = stage_manifest("train", TrainConfig(seed=0), {"base": "x"})
    assert first.fingerprint != other.fingerprint
    assert first.fingerprint == again.fingerprint


def test_an_output_directory_appears_complete_or_not_at_all(tmp_path):
    stage = stage_manifest("split", SplitConfig(), {})
    path = tmp_path / "split"
    with pytest.raises(RuntimeError), output_directory(path, stage) as directory:
        (directory / "half").write_text("x")
        raise RuntimeError
    assert not path.exists() and not is_complete(path, stage.fingerprint)
    with output_directory(path, stage) as directory:
        assert (directory / "half").exists()  # the same stage resumes from those files
        (directory / "whole").write_text("y")
    assert is_complete(path, stage.fingerprint)
    assert sorted(file.name for file in path.iterdir()) == ["half", "stage.json", "whole"]
    written = read_manifest(StageManifest, path / "stage.json")
    assert replace(written, files={}) == stage
    assert {name: size for name, (size, _) in written.files.items()} == {"half": 1, "whole": 1}


def test_another_stage_does_not_resume_from_foreign_files(tmp_path):
    path = tmp_path / "split"
    first, second = (stage_manifest("split", SplitConfig(seed=s), {}) for s in (0, 1))
    with pytest.raises(RuntimeError), output_directory(path, first) as directory:
        (directory / "half").write_text("x")
        raise RuntimeError
    with output_directory(path, second) as directory:
        assert not (directory / "half").exists()
    with output_directory(path, first):
        # The old output stays until the new one is complete.
        assert is_complete(path, second.fingerprint)
    assert is_complete(path, first.fingerprint)
    assert [file.name for file in tmp_path.iterdir()] == ["split"]


def test_an_output_that_cannot_be_written_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    stage = stage_manifest("split", SplitConfig(), {})
    with (
        pytest.raises(InputError, match="cannot be written"),
        output_directory(tmp_path / "file" / "x", stage),
    ):
        pass


def test_a_complete_output_only_gets_its_name_after_a_crash(tmp_path, monkeypatch):
    stage = stage_manifest("split", SplitConfig(), {})
    path = tmp_path / "split"
    with monkeypatch.context() as patch:
        patch.setattr(directories.os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), output_directory(path, stage) as directory:
            (directory / "split.json").write_text("{}")
    assert not path.exists()
    recover_directory(path, "of another stage")
    assert not path.exists()
    recover_directory(path, stage.fingerprint)
    assert is_complete(path, stage.fingerprint)
    assert sorted(file.name for file in path.iterdir()) == ["split.json", "stage.json"]
    assert [file.name for file in tmp_path.iterdir()] == ["split"]


# ---- one file
KILLED = """
import os, signal, sys
from pathlib import Path
from merit_fast.manifests.atomic import write_text

os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
write_text(Path(sys.argv[1]), "new")
"""


@pytest.mark.process
def test_kill_9_between_write_and_rename_leaves_the_old_file(tmp_path):
    file = tmp_path / "file.json"
    write_text(file, "old")
    result = subprocess.run([sys.executable, "-c", KILLED, str(file)])
    assert result.returncode == -signal.SIGKILL
    assert file.read_text() == "old"
    (leftover,) = tmp_path.glob("file.json.*.tmp")
    assert leftover.read_text() == "new"  # killed after the write, so the test proves the rename


def test_finishing_a_directory_removes_the_files_of_killed_writers(tmp_path):
    stage = stage_manifest("split", SplitConfig(), {})
    with output_directory(tmp_path / "split", stage) as directory:
        (directory / "split.json.123.tmp").write_text("half")
    assert [file.name for file in (tmp_path / "split").iterdir()] == ["stage.json"]


@pytest.mark.parametrize("fsync", [True, False])
def test_a_file_is_fsynced_before_its_rename_and_the_folder_after(tmp_path, monkeypatch, fsync):
    calls = []
    real_fsync = os.fsync
    real_replace = os.replace

    def record_fsync(descriptor):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def record_replace(source, target):
        calls.append(("rename", str(target)))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    (tmp_path / "new").write_bytes(b"x")
    replace_file(tmp_path / "new", tmp_path / "file", fsync)
    rename = ("rename", str(tmp_path / "file"))
    fsyncs = [("fsync", str(tmp_path / "new")), ("fsync", str(tmp_path))]
    assert calls == ([fsyncs[0], rename, fsyncs[1]] if fsync else [rename])


def test_bytes_and_text_are_written_as_they_are(tmp_path):
    write_bytes(tmp_path / "file", b"\x00\xff\r\n")
    assert (tmp_path / "file").read_bytes() == b"\x00\xff\r\n"
    write_text(tmp_path / "file", "é\r\n")
    assert (tmp_path / "file").read_bytes() == "é\r\n".encode()
