"""Locks: one config per output, one process per stage, and a dead owner's lock is free."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from support.paths import KILL_AT
from support.runs import Notes
from support.warm import run_together

from merit_fast.errors import InputError
from merit_fast.manifests.locks import (
    LOCKS_FOLDER,
    LockedError,
    claim,
    exclusive,
    owner_of,
    owners,
    this_process,
)
from merit_fast.merge import merge_models
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, config: str, held) -> None:
    with claim(folder, this_process(config), "OUT"):
        held.send_bytes(b"held")
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds ``tmp_path/.locks`` for the config ``a``."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=hold, args=(tmp_path / LOCKS_FOLDER, "a", sender))
    process.start()
    assert receiver.poll(30)
    yield process
    process.kill()
    process.join()


def test_another_config_is_refused_and_names_the_process(tmp_path, holder):
    folder = tmp_path / LOCKS_FOLDER
    message = rf"^OUT: process {holder.pid} \(.+, since \d\d:\d\d\) works here with another config$"
    with pytest.raises(LockedError, match=message), claim(folder, this_process("b"), "OUT"):
        pass
    with claim(folder, this_process("a"), "OUT"):
        assert len(owners(folder)) == 2
    assert [owner.pid for owner in owners(folder)] == [holder.pid]


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    folder = tmp_path / LOCKS_FOLDER
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert os.listdir(folder)
    with claim(folder, this_process("b"), "OUT"):
        assert [owner.config for owner in owners(folder)] == ["b"]
    assert not folder.exists()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    with claim(tmp_path / LOCKS_FOLDER, this_process("a"), "OUT"):
        child = FORK.Process(target=time.sleep, args=(60,))
        child.start()
    try:
        with claim(tmp_path / LOCKS_FOLDER, this_process("b"), "OUT"):
            assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_an_exclusive_lock_has_one_holder_and_a_name(tmp_path):
    lock = tmp_path / LOCKS_FOLDER / "stage"
    with exclusive(lock, this_process("a")):
        assert owner_of(lock).pid == os.getpid()
        mine = f"process {os.getpid()}"
        with pytest.raises(LockedError, match=mine), exclusive(lock, wait=False):
            pass
    assert owner_of(lock) is None and not lock.parent.exists()


def test_many_threads_pass_one_at_a_time(tmp_path):
    inside = []
    seen = []

    def work():
        for _ in range(20):
            with exclusive(tmp_path / LOCKS_FOLDER / "x"):
                inside.append(1)
                seen.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 80


def test_a_run_refuses_an_output_of_another_config(finished_run, tmp_path, monkeypatch):
    out = finished_run.copy_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    with claim(out / LOCKS_FOLDER, this_process("another"), out):
        run = Run(read_run_config(finished_run.config))
        with pytest.raises(InputError, match="out: process .* works here with another config"):
            run.all()


def test_a_second_process_waits_for_the_stage_and_says_for_whom(
    finished_run, tmp_path, monkeypatch
):
    out = finished_run.copy_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    notes = Notes()
    run = Run(read_run_config(finished_run.config), notes)
    with exclusive(out / LOCKS_FOLDER / "stage-branches+merit-0", this_process("a")):
        thread = threading.Thread(target=run.train)
        thread.start()
        limit = time.monotonic() + 30
        while not any(note.endswith("waiting for it") for note in notes.notes):
            assert time.monotonic() < limit
            time.sleep(0.01)
        assert notes.notes[0].endswith("makes it; it comes last here")
        assert "branches/merit-1: up to date" in notes.notes
        assert "branches/merit-0: up to date" not in notes.notes
    thread.join(30)
    assert notes.notes[-1] == "branches/merit-0: up to date"


def test_a_merge_holds_its_output(tiny_model, tmp_path):
    locks = tmp_path / f".m{LOCKS_FOLDER}"
    message = "m: process .* works here with another config"
    with claim(locks, this_process("another"), "m"), pytest.raises(InputError, match=message):
        merge_models([tiny_model], [1.0], out=tmp_path / "m")
    merge_models([tiny_model], [1.0], out=tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_of_one_config_share_the_training(finished_run, tmp_path):
    config = finished_run.copy_config(tmp_path)
    nothing = "no file has this name"
    command = [str(KILL_AT), nothing, "1", "run", str(config), "--json"]
    results = run_together([command, command], tmp_path)
    for result in results:
        assert result.returncode == 0, result.stderr
    assert results[0].stdout == results[1].stdout
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert not (tmp_path / "out" / LOCKS_FOLDER).exists()
