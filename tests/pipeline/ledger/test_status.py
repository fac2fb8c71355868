"""``status`` shows every output's state and ``clean`` removes only what nothing needs."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from merit_fast.cli.main import main
from merit_fast.manifests.locks import LOCKS_FOLDER, claim, exclusive, this_process
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run


@pytest.fixture
def out(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return finished_run.copy_to(tmp_path)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process; returns its exit code, output and errors."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["merit-fast", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def states(command):
    def read(*words):
        code, text, errors = command("status", *words, "--json")
        assert code == 0, errors
        return {row["name"]: row for row in json.loads(text)["outputs"]}

    return read


def words_of(rows):
    return {name: row["state"] for name, row in rows.items()}


WHOLE = dict.fromkeys(
    [
        "sketch",
        "split",
        "branches/merit-0",
        "branches/merit-1",
        "merged/merit",
        "evaluate",
        "report",
    ],
    "up to date",
)


def test_a_finished_run_is_up_to_date_with_and_without_its_config(out, finished_run, states):
    for target in (out, finished_run.config):
        rows = states(target)
        assert words_of(rows) == WHOLE
        assert all(row["num_bytes"] > 0 and row["seconds"] > 0 for row in rows.values())
    before = (out / "run.json").read_bytes()
    assert words_of(states(out, "--verify")) == WHOLE and (out / "run.json").read_bytes() == before


def test_every_state_has_its_word(out, finished_run, states):
    os.truncate(out / "split/split.json", 5)
    assert states(out)["split"]["detail"].startswith("split/split.json: 5 bytes instead of ")
    shutil.copyfile(finished_run.out / "split/split.json", out / "split/split.json")
    os.rename(out / "branches/merit-0", out / "branches/merit-0.tmp")
    (out / "branches/mine").mkdir()
    shutil.copytree(out / "branches/merit-1", out / "branches/merit-9")
    shutil.rmtree(out / "merged/merit")
    rows = states(finished_run.config)
    expected = {
        "branches/merit-0": "unfinished",
        "branches/mine": "foreign",
        "branches/merit-9": "not in force",
        "merged/merit": "absent",
    }
    assert words_of(rows) == WHOLE | expected
    rows = states(finished_run.config, "train.epochs=2")
    assert rows["branches/merit-1"]["state"] == "made from another config"
    assert rows["branches/merit-1"]["detail"] == "train.epochs 1 -> 2"
    lock = out / LOCKS_FOLDER / "stage-branches+merit-0"
    with exclusive(lock, this_process("a")):
        row = states(out)["branches/merit-0"]
    assert row["state"] == "being made" and f"by process {os.getpid()}" in row["detail"]


def test_a_run_without_a_ledger_names_the_way_out(out, command):
    (out / "run.json").unlink()
    code, _, errors = command("status", out)
    assert code == 2 and "run.json: does not exist; write it again with: merit-fast run" in errors


def test_clean_removes_what_nothing_needs_and_says_what_it_freed(out, finished_run, command):
    Run(read_run_config(finished_run.config, ["train.epochs=2"])).train()
    Run(read_run_config(finished_run.config)).train()
    shutil.copytree(out / "branches/merit-1", out / "branches/merit-9")
    shutil.copytree(out / "branches/merit-1", out / "branches/merit-1.tmp")
    (out / "branches/mine").mkdir()
    (out / "branches/mine.tmp").mkdir()
    (out / "branches/mine.tmp/thesis.txt").write_text("mine")
    before = sorted(path.relative_to(out) for path in out.rglob("*"))
    code, _, errors = command("clean", out)
    assert code == 2 and "--yes" in errors
    code, text, _ = command("clean", out, "--dry-run", "--json")
    listed = json.loads(text)
    assert code == 0 and listed["removed"] == [] and len(listed["kept"]) == 4
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == before
    code, text, _ = command("clean", out, "--yes", "--json")
    result = json.loads(text)
    assert sorted(result["removed"]) == sorted(listed["kept"]) and result["freed_bytes"] > 10000
    assert sorted(os.listdir(out / "branches")) == ["merit-0", "merit-1", "mine", "mine.tmp"]
    assert not any((out / "old/branches").iterdir())
    _, text, _ = command("status", finished_run.config, "--json")
    assert set(WHOLE) <= {row["name"] for row in json.loads(text)["outputs"]}
    _, text, _ = command("clean", out, "--yes")
    assert "0 B can be freed" in text


def test_clean_leaves_the_work_of_a_live_process(out, command):
    shutil.copytree(out / "branches/merit-1", out / "branches/merit-1.tmp")
    shutil.copytree(out / "branches/merit-1", out / "branches/merit-9")
    owner = this_process("a")
    with (
        claim(out / LOCKS_FOLDER, owner, out),
        exclusive(out / LOCKS_FOLDER / "stage-branches+merit-1", owner),
    ):
        code, text, _ = command("clean", out, "--yes", "--json")
    assert code == 0 and json.loads(text)["removed"] == []
    assert Path(out / "branches/merit-1.tmp").exists() and Path(out / "branches/merit-9").exists()
