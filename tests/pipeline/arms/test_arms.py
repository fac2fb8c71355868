"""Arms: neither sketch nor branches see the rows of a warm-up; iid branches share the others."""

import pytest
import yaml
from support.runs import Notes, run_values

from merit_fast.data import Dataset
from merit_fast.data.shares import dealt_rows, warmup_rows
from merit_fast.errors import InputError
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import BranchManifest, SplitManifest
from merit_fast.model import model_fingerprint
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run


def dataset(name="d", rows=37):
    return Dataset(name, tuple(range(rows)))  # rows stand for themselves


def test_warmup_rows_and_the_rest_are_the_whole_in_order():
    first, rest = warmup_rows(dataset(), 0.25, seed=3)
    assert len(first.examples) == 9 and list(first.examples) == sorted(first.examples)
    assert sorted([*first.examples, *rest.examples]) == list(range(37))
    again, _ = warmup_rows(dataset(), 0.25, seed=3)
    assert again.examples == first.examples
    assert warmup_rows(dataset(), 0.25, seed=4)[0].examples != first.examples
    other = dataset("other")
    assert warmup_rows(other, 0.25, seed=3)[0].examples != first.examples
    assert warmup_rows(other, 0.25, seed=3, key="d")[0].examples == first.examples


def test_a_warmup_that_leaves_nothing_is_refused_by_name():
    with pytest.raises(InputError, match="^tiny: a warm-up on 0.9 of 2 rows leaves none"):
        warmup_rows(dataset("tiny", 2), 0.9, 0)


def test_dealt_rows_are_even_shares():
    shares = [dealt_rows(dataset(), number, 4, seed=1).examples for number in range(4)]
    assert sorted(row for share in shares for row in share) == list(range(37))
    assert sorted(len(share) for share in shares) == [9, 9, 9, 10]


def test_a_run_with_warmup_and_iid_control(tmp_path, tiny_model, tiny_mixture, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = run_values(tiny_model, tiny_mixture)
    values["split"] |= {"warmup": 0.25}
    values["train"] |= {"controls": {"joint": True, "iid": 1}, "epochs": 1}
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(values))
    progress = Notes()
    run = Run(read_run_config(file), progress)
    summary = run.all()
    assert list(summary["arms"]) == ["base", "joint", "joint@0.5", "iid", "merit"]
    branches = {
        name: read_manifest(BranchManifest, tmp_path / "out" / "branches" / name / "branch.json")
        for name in ("warmup", "joint", "merit-0", "merit-1", "iid-0", "iid-1")
    }
    count = {name: branch.num_examples for name, branch in branches.items()}
    assert count["warmup"] + count["merit-0"] + count["merit-1"] == count["joint"]
    assert count["iid-0"] + count["iid-1"] == count["merit-0"] + count["merit-1"]
    assert len(branches["iid-0"].datasets) == len(branches["iid-1"].datasets) == 4
    starts = {name: branch.start_fingerprint for name, branch in branches.items()}
    assert starts["merit-0"] == starts["iid-1"] != starts["joint"] == starts["warmup"]
    base = model_fingerprint(tiny_model)
    assert {branch.base_fingerprint for branch in branches.values()} == {base} == {starts["joint"]}
    split = read_manifest(SplitManifest, tmp_path / "out" / "split" / "split.json")
    assert split.base_fingerprint == starts["joint"]
    assert split.start_fingerprint == starts["merit-0"]
    assert sum(row.num_examples for row in split.datasets) == count["merit-0"] + count["merit-1"]

    progress.notes.clear()
    assert Run(read_run_config(file), progress).all() == summary
    assert all(note.endswith("up to date") for note in progress.notes)
    values["split"]["warmup"] = 0.5
    file.write_text(yaml.safe_dump(values))
    progress.notes.clear()
    Run(read_run_config(file), progress).sketch()
    assert progress.notes[-1] != "sketch: up to date"
