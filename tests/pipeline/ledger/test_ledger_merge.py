"""``merge OUT --run RUN`` merges exactly the branches in force; sketches are known by content."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from support.checks import tree_bytes
from support.paths import KILL_AT
from support.runs import Notes
from support.warm import run_python

from merit_fast.cli.merge import in_force
from merit_fast.cli.merge.command import merge_command
from merit_fast.cli.merge.in_force import Quorum, RunSource, branches_in_force, parse_quorum
from merit_fast.cli.verify import verify_command
from merit_fast.errors import InputError
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run


@pytest.fixture
def out(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return finished_run.copy_to(tmp_path)


def stage(config: Path, name: str, *assignments: str) -> list[str]:
    notes = Notes()
    run = Run(read_run_config(config, assignments), notes, "merit-fast {stage} run.yml")
    getattr(run, name)()
    return notes.notes


def names_in_force(out: Path) -> list[str]:
    return [path.name for path in branches_in_force(out)]


def test_only_the_branches_of_the_split_in_force_are_merged(finished_run, out):
    assert names_in_force(out) == ["merit-0", "merit-1"]
    labels = json.loads((out / "split/split.json").read_text())["datasets"]
    groups = {row["group"]: row["name"] for row in labels}
    # one dataset of either group together: no group of the new split is one of the old
    other = ["split.groups=3", f"split.pins={{together: [[{groups[0]}, {groups[1]}]]}}"]
    stage(finished_run.config, "split", *other)
    with pytest.raises(InputError, match="merit-0: belongs to another split.*merit-fast train run"):
        branches_in_force(out)
    stage(finished_run.config, "train", *other)
    assert names_in_force(out) == ["merit-0", "merit-1", "merit-2"]
    stage(finished_run.config, "split")
    stage(finished_run.config, "train")
    assert (out / "branches/merit-2").exists()
    assert names_in_force(out) == ["merit-0", "merit-1"]


def test_unfinished_foreign_and_copied_branches_do_not_count(out):
    shutil.copytree(out / "branches/merit-0", out / "branches/merit-0.tmp")
    shutil.copytree(out / "branches/merit-0", out / "branches/merit-7")
    (out / "branches/notes").mkdir()
    assert names_in_force(out) == ["merit-0", "merit-1"]


def test_a_half_new_recipe_is_refused(finished_run, out):
    script = str(KILL_AT)
    command = [script, "branches/merit-1$", "1", "train", str(finished_run.config)]
    result = run_python([*command, "train.epochs=2"], cwd=out.parent)
    assert result.returncode == -signal.SIGKILL, result.stderr
    with pytest.raises(InputError, match="branches/merit-1: (belongs to another|is not finished)"):
        branches_in_force(out)


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda out: shutil.rmtree(out / "branches/merit-1"), "merit-1: is not finished"),
        (lambda out: (out / "branches/merit-1/branch.json").unlink(), "branch.json: is absent"),
        (
            lambda out: os.truncate(next(out.glob("branches/merit-1/model-00001*")), 1000),
            "merit-1/model-00001.*: 1,000 bytes instead of",
        ),
        (lambda out: (out / "run.json").unlink(), "run.json: does not exist; write it again with"),
        (lambda out: (out / "run.json").write_text("{"), "run.json: is not readable JSON"),
    ],
)
def test_a_branch_that_is_not_whole_is_named(damage, message, out):
    damage(out)
    with pytest.raises(InputError, match=message):
        branches_in_force(out)


def test_the_arm_and_the_seed_are_looked_up(out, tmp_path):
    with pytest.raises(InputError, match="run.json: branches: has no arm 'joint' to merge; its"):
        branches_in_force(out, "joint")
    with pytest.raises(InputError, match="no arm 'merit.seed1'"):
        branches_in_force(out, "merit", 1)


@pytest.mark.parametrize(
    "flags", [["--arm", "merit"], ["--seed-index", "0"], ["--quorum", "1/2"], ["--grace", "1h"]]
)
def test_flags_of_a_run_go_with_one(call, flags):
    code, _, error = call("merge", "x", "--model", "a", *flags)
    assert code == 2 and "--quorum and --grace go with --run" in error


@pytest.mark.parametrize(
    "quorum,grace,rule",
    [
        ("3", None, "--quorum: must be I/N with 1 <= I <= N, got '3'"),
        ("5/4", None, "--quorum: must be I/N"),
        ("1/2", "soon", "--grace: must be a number and s, m, h or d, as in 2h, got 'soon'"),
        (None, "2h", "--grace: goes with --quorum"),
    ],
)
def test_a_quorum_and_a_grace_have_a_form(quorum, grace, rule):
    with pytest.raises(InputError, match=re.escape(rule)):
        parse_quorum(quorum, grace)
    assert parse_quorum("3/4", "1.5h") == Quorum(3, 4, 5400.0)
    assert [Quorum(3, 4).needed(count) for count in (1, 2, 4, 5)] == [1, 2, 3, 4]


def test_a_quorum_merges_without_a_lost_branch_and_says_so(out, call):
    """The weights are those of the branches that are there; the card names the others."""
    shutil.rmtree(out / "branches/merit-1")
    code, _, error = call("merge", "half", "--run", out)
    assert code == 2 and "merit-1: is not finished; run first: merit-fast run" in error
    code, _, error = call("merge", "half", "--run", out, "--quorum", "2/2")
    assert code == 2 and error.strip().endswith("the quorum is 2, 1 are finished")
    assert not Path("half").exists()
    code, text, error = call("merge", "half", "--run", out, "--quorum", "1/2", "--grace", "0.1s")
    assert code == 0 and "weight 1.000000" in text, error
    assert "waiting for merit-1" in error and "merge: without merit-1: " in error
    assert "**Without `merit-1`**: not finished" in Path("half/README.md").read_text()
    ours = {n: b for n, b in tree_bytes(Path("half")).items() if n.startswith("model")}
    one = {n: b for n, b in tree_bytes(out / "branches/merit-0").items() if n.startswith("model")}
    assert ours == one


def test_a_branch_that_ends_within_the_grace_is_merged(out, monkeypatch):
    """The wait looks at the files again and again."""
    shutil.move(out / "branches/merit-1", "later")
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            shutil.move("later", out / "branches/merit-1")

    monkeypatch.setattr(in_force.time, "sleep", sleep)
    notes = Notes()
    source = RunSource(out, quorum=Quorum(1, 2, 3600.0))
    paths, facts = source.branches(notes)
    assert [path.name for path in paths] == ["merit-0", "merit-1"] and facts.absent == ()
    assert len(looks) == 2 and notes.notes == ["merge: waiting for merit-1"] * 2


def test_merge_and_verify_of_a_run(out, tmp_path, capsys):
    notes = Notes()
    merge_command("m", None, None, RunSource(out), None, [], notes)
    assert json.loads((tmp_path / "m/stage.json").read_text())["files"]
    assert not notes.notes
    merge_command("m", None, None, RunSource(out), None, ["weights=uniform"], notes)
    assert notes.notes == ["m: merge.weights 'tokens' -> 'uniform'; merging again"]
    for directory in ("m", "out", "out/merged/merit"):
        verify_command(directory, as_json=False)
    assert capsys.readouterr().out.count("files agree with their checksums") == 3
    for weights in (
        next(Path("m").glob("model-*")),
        next(Path("out/merged/merit").glob("model-*")),
    ):
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        before = weights.stat()
        weights.write_bytes(data)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(InputError, match=f"{weights}: has the same size and other content"):
            verify_command(str(weights.parent), as_json=False)
    with pytest.raises(InputError, match="merged/merit/model.*other content"):
        verify_command("out", as_json=False)


# ---- sketches by content
def edited(config: Path, folder: Path, change) -> Path:
    values = yaml.safe_load(config.read_text())
    change(values["mixture"])
    file = folder / "edited.yml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_a_renamed_dataset_keeps_its_sketch(finished_run, out):
    file = edited(finished_run.config, out.parent, lambda mixture: mixture[1].update(name="abc"))
    notes = stage(file, "sketch")
    assert "sketch: 4 of 4 datasets are as before, their sketches are reused" in notes
    was = finished_run.out / "sketch/codes.safetensors"
    assert (out / "sketch/abc.safetensors").read_bytes() == was.read_bytes()
    assert not (out / "sketch/codes.safetensors").exists()


def test_a_killed_sketch_keeps_the_datasets_that_were_not_edited(
    finished_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    finished_run.copy_config(tmp_path)
    command = [str(KILL_AT), "sketch.tmp/opposites.safetensors", "1", "sketch"]
    result = run_python([*command, str(finished_run.config)], cwd=tmp_path)
    assert result.returncode == -signal.SIGKILL, result.stderr
    rows = tmp_path / "rows.jsonl"
    mixture = yaml.safe_load(finished_run.config.read_text())["mixture"]
    rows.write_text("".join(Path(mixture[0]["path"]).read_text().splitlines(True)[:-1]))

    def edit(mixture):
        mixture[0]["path"] = str(rows)

    file = edited(finished_run.config, tmp_path, edit)
    kept = {
        path.name: path.stat().st_mtime_ns
        for path in (tmp_path / "out/sketch.tmp").glob("*.safetensors")
    }
    assert set(kept) == {"capitals.safetensors", "codes.safetensors", "plurals.safetensors"}
    stage(file, "sketch")
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/sketch").iterdir()}
    assert all(now[name] == kept[name] for name in ("codes.safetensors", "plurals.safetensors"))
    assert now["capitals.safetensors"] != kept["capitals.safetensors"]
    clean = tmp_path / "clean"
    clean.mkdir()
    monkeypatch.chdir(clean)
    stage(Path(shutil.copy(file, clean)), "sketch")
    assert tree_bytes(clean / "out/sketch") == tree_bytes(tmp_path / "out/sketch")


def test_a_damaged_sketch_is_not_reused(finished_run, out):
    state = out / "sketch/codes.safetensors"
    os.truncate(state, 1000)
    notes = stage(finished_run.config, "sketch")
    assert "sketch: 3 of 4 datasets are as before, their sketches are reused" in notes
    assert state.read_bytes() == (finished_run.out / "sketch/codes.safetensors").read_bytes()
