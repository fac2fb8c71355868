"""No branch is trained twice: renamed datasets, flipped groups and equal arms cost no training."""

import signal
from contextlib import contextmanager

import pytest
import yaml
from support.checks import tree_bytes
from support.paths import KILL_AT
from support.runs import MEASURED, Notes, run_values
from support.warm import run_python

from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import BranchManifest, EvaluateManifest
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run

HALVES = [["capitals", "codes"], ["plurals", "opposites"]]


class Trained(Notes):
    """Keeps the names of the branches that were trained."""

    def __init__(self):
        super().__init__()
        self.names = []

    @contextmanager
    def task(self, name, total, unit):
        if name.startswith("train "):
            self.names.append(name.removeprefix("train "))
        yield self


@pytest.fixture
def train(tmp_path, tiny_model, tiny_mixture, monkeypatch):
    """Trains a run with given groups of datasets; returns the branches trained and the notes."""
    monkeypatch.chdir(tmp_path)

    def train(manual, mixture=None, stages=("sketch", "split", "train"), **options):
        values = run_values(tiny_model, mixture or tiny_mixture)
        values["split"] |= {"groups": len(manual), "method": "manual", "manual": manual}
        values["train"] |= {"epochs": 1, "controls": {}, **options}
        (tmp_path / "run.yml").write_text(yaml.safe_dump(values))
        progress = Trained()
        run = Run(read_run_config(tmp_path / "run.yml"), progress)
        for stage in stages:
            getattr(run, stage)()
        return progress.names, progress.notes

    return train


def branch_json(tmp_path, name):
    return read_manifest(BranchManifest, tmp_path / "out" / "branches" / name / "branch.json")


def weights(tmp_path, name):
    folder = tmp_path / "out" / "branches" / name
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_flipped_groups_and_renamed_datasets_train_nothing(train, tmp_path, tiny_mixture):
    trained, notes = train(HALVES)
    assert trained == ["merit-0", "merit-1"]
    assert sum("is far from converged" in note for note in notes) == 1
    assert "train: the shortest branch, merit-0, takes 4 steps; below about 100" in str(notes)
    first = weights(tmp_path, "merit-0")
    second = weights(tmp_path, "merit-1")

    trained, notes = train(HALVES[::-1])
    assert trained == [] and not any("far from converged" in note for note in notes)
    assert "branches/merit-0: branches/merit-1 has the same rows, start and recipe" in str(notes)
    assert weights(tmp_path, "merit-0") == second and weights(tmp_path, "merit-1") == first
    assert branch_json(tmp_path, "merit-0").datasets == ("plurals", "opposites")
    assert (branch_json(tmp_path, "merit-1").branch, branch_json(tmp_path, "merit-1").group) == (
        "merit-1", 1)  # fmt: skip

    renamed = [{**entry, "name": f"my-{entry['name']}"} for entry in tiny_mixture]
    groups = [[f"my-{name}" for name in group] for group in HALVES]
    trained, notes = train(groups, renamed)
    assert trained == [] and weights(tmp_path, "merit-0") == first
    assert branch_json(tmp_path, "merit-0").datasets == ("my-capitals", "my-codes")
    trained, notes = train(groups, renamed)
    assert trained == []
    assert all(note.endswith("up to date") for note in notes)


def test_a_control_takes_over_a_group_that_merit_had_and_a_damaged_one_is_trained(train, tmp_path):
    train(HALVES)
    thirds = [HALVES[0], ["plurals"], ["opposites"]]
    assert train(thirds)[0] == ["merit-1", "merit-2"]
    assert weights(tmp_path, "merit-0")
    old = list((tmp_path / "out" / "old" / "branches").iterdir())
    assert [path.name.split("-")[:2] for path in old] == [["merit", "1"]]
    trained, notes = train(HALVES[::-1])  # from old/ and from merit-0
    assert trained == []
    file = tmp_path / "out" / "branches" / "merit-0" / "losses.json"
    file.write_text("[]")
    trained, notes = train(HALVES)
    assert trained == ["merit-1"]
    assert branch_json(tmp_path, "merit-1").datasets == ("plurals", "opposites")


def test_joint_of_one_group_is_trained_and_measured_once(train, tmp_path):
    controls = {"joint": True, "joint_short": True, "random": 2}
    stages = ("sketch", "split", "train", "merge", "evaluate")
    trained, notes = train([sum(HALVES, [])], stages=stages, controls=controls)
    assert trained == ["merit-0"]
    assert "iid, joint, joint-short: the same model as merit, trained and shown once" in notes
    assert sorted(path.name for path in (tmp_path / "out" / "merged").iterdir()) == ["merit"]
    evaluation = read_manifest(EvaluateManifest, tmp_path / "out" / "evaluate" / "evaluate.json")
    assert list(evaluation.arms) == ["base", "joint@0.5", "merit"]
    assert evaluation.merging_gain["merit"].gain == 0.0
    assert train([sum(HALVES, [])])[0] == []  # without controls it is the same branch


def test_seeds_and_joint_controls_follow_their_recipes(train, tmp_path):
    controls = {"joint": True, "joint_short": True, "joint_low": 0.5}
    trained, _ = train([HALVES[0], *([name] for name in HALVES[1])], controls=controls, seeds=2)
    assert len(trained) == len(set(trained)) == 12
    branches = {name: branch_json(tmp_path, name) for name in trained}
    assert branches["joint"].steps == 8 and branches["joint"].num_examples == 32
    short = branches["joint-short"]
    assert (short.steps, short.num_examples) == (4, 16)  # as merit-0
    assert branches["merit-0"].steps == 4 and branches["merit-1"].steps == 2
    assert {branches[name].seed for name in trained if name.endswith(".seed1")} == {1}
    assert branches["merit-0.seed1"].num_target_tokens == branches["merit-0"].num_target_tokens
    for other in ("merit-0.seed1", "joint", "joint-low"):
        assert weights(tmp_path, "merit-0") != weights(tmp_path, other)
    assert weights(tmp_path, "joint") != weights(tmp_path, "joint-low")
    trained, _ = train([HALVES[0], *([name] for name in HALVES[1])], seeds=3)
    assert trained == ["merit-0.seed2", "merit-1.seed2", "merit-2.seed2"]


@pytest.mark.process
@pytest.mark.slow
def test_seeds_and_flipped_groups_survive_kill_9(train, tmp_path):
    train(HALVES, stages=("sketch", "split"), seeds=2, checkpoint_steps=1)
    for pattern, count in (("merit-1.tmp/resume", 2), ("branches/merit-0.seed1", 2)):
        killed = run_python([str(KILL_AT), pattern, str(count), "train", "run.yml"], cwd=tmp_path)
        assert killed.returncode == -signal.SIGKILL, (pattern, killed.stderr)
    trained, _ = train(HALVES, seeds=2, checkpoint_steps=1)
    assert trained == ["merit-0.seed1", "merit-1.seed1"]
    ignored = (*MEASURED, "config.yml")
    whole = {name: tree_bytes(tmp_path / "out" / "branches" / name, ignored) for name in trained}
    train(HALVES[::-1], stages=("sketch", "split"), seeds=2, checkpoint_steps=1)
    for pattern in ("branches/merit-1$", "branches/merit-0.seed1$"):
        killed = run_python([str(KILL_AT), pattern, "1", "train", "run.yml"], cwd=tmp_path)
        assert killed.returncode == -signal.SIGKILL, (pattern, killed.stderr)
    trained, _ = train(HALVES[::-1], seeds=2, checkpoint_steps=1)
    assert trained == []
    flipped = tree_bytes(tmp_path / "out" / "branches" / "merit-1.seed1", (*ignored, "branch.json"))
    whole["merit-0.seed1"].pop("branch.json")
    assert flipped == whole["merit-0.seed1"]
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_renamed_dataset_changes_its_branch_in_place(train, tmp_path, tiny_mixture):
    assert train(HALVES)[0] == ["merit-0", "merit-1"]
    first = weights(tmp_path, "merit-0")
    renamed = [{**tiny_mixture[0], "name": "cities"}, *tiny_mixture[1:]]
    groups = [["cities", "codes"], HALVES[1]]
    trained, notes = train(groups, renamed)
    assert trained == [] and "branches/merit-0: has other names of datasets" in str(notes)
    assert branch_json(tmp_path, "merit-0").datasets == ("cities", "codes")
    assert weights(tmp_path, "merit-0") == first
    assert train(groups, renamed)[0] == []


def test_branches_that_are_measured_keep_their_rows_by_content(train, tiny_mixture):
    """A name decides which half of the held-out rows chooses a checkpoint, and nothing else."""
    watched = {"evaluate_steps": 2}
    assert train(HALVES, **watched)[0] == ["merit-0", "merit-1"]
    renamed = [{**entry, "name": f"my-{entry['name']}"} for entry in tiny_mixture]
    groups = [[f"my-{name}" for name in group] for group in HALVES]
    assert train(groups, renamed, **watched)[0] == []
    halved = watched | {"patience": 2}
    assert train(groups, renamed, **halved)[0] == ["merit-0", "merit-1"]
    assert train(HALVES, **halved)[0] == ["merit-0", "merit-1"]
    first, *others = tiny_mixture
    fewer = [{**first, "eval_path": others[0]["eval_path"]}, *others]
    assert train(HALVES, fewer, **halved)[0] == ["merit-0"]
