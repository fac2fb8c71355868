"""The files in examples/ run on a tiny model."""

import json
import runpy
import shutil
import sys

import pytest
from safetensors import safe_open
from support.docs.pages import ROOT

from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import SplitManifest

EXAMPLES = ROOT / "examples"


def test_every_example_is_tested():
    names = {file.name for file in EXAMPLES.iterdir() if not file.name.startswith("__")}
    assert names == {
        "run.yml",
        "recipe.yml",
        "trainer.py",
        "trl_sft.py",
        "trl_run.yml",
        "trl_lora.yml",
        "merge_branches.py",
        "first_steps.ipynb",
        "paper",  # test_paper_examples.py
    }


def test_run(workspace):
    """The fixture has run it; pages may have split again since."""
    split = json.loads((workspace / "split_of_run.json").read_text())
    assert {row["name"] for row in split["datasets"]} == {"capitals", "codes", "plurals"}
    assert {row["group"] for row in split["datasets"]} == {0, 1}
    assert (workspace / "runs/mine/report/report.html").stat().st_size > 0


def test_recipe(working_directory, call):
    code, _, error = call("merge", "from_recipe", "--mergekit", EXAMPLES / "recipe.yml")
    assert code == 0, error
    (file,) = (working_directory / "from_recipe").glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        dtypes = {str(tensors.get_tensor(name).dtype) for name in tensors.keys()}  # noqa: SIM118
    assert dtypes == {"torch.bfloat16"}


ROWS = [f"data/{name}.jsonl" for name in ("capitals", "codes", "plurals")]
COUNTS = ["--steps", "12", "--batch-size", "2"]  # each row once


def test_trainer(working_directory, run_example):
    printed = run_example("trainer.py", "BASE", "trained", *ROWS, *COUNTS)
    assert "rms_norm x 5, add_rms_norm x 2, swiglu x 2, rope x 2, head x 1" in printed
    check_training(working_directory, "trained")


def test_trl_sft(working_directory, run_example):
    pytest.importorskip("trl", reason="trl, which this example is for, is not installed")
    printed = run_example("trl_sft.py", "BASE", "sft", *ROWS, *COUNTS)
    assert "rms_norm x 5, add_rms_norm x 2, swiglu x 2, rope x 2, head x 1" in printed
    check_training(working_directory, "sft")


@pytest.mark.process
@pytest.mark.slow
def test_branches_that_trl_trains_packed_with_lora_are_merged_and_measured(working_directory, call):
    """Three commands after the split: TRL really trains two branches, each in a process."""
    pytest.importorskip("trl", reason="trl, which this example is for, is not installed")
    pytest.importorskip("peft", reason="peft, which this example is for, is not installed")
    for name in ("trl_run.yml", "trl_lora.yml"):
        shutil.copy(EXAMPLES / name, name)
    for command in ("sketch", "split", "train", "merge", "evaluate"):
        code, _, error = call(command, "trl_run.yml")
        assert code == 0, error
    out = working_directory / "runs/trl"
    seen = set()
    for name in ("merit-0", "merit-1"):
        folder = out / "branches" / name
        branch = json.loads((folder / "branch.json").read_text())
        counts = json.loads((folder / "dataset_counts.json").read_text())["datasets"]
        assert set(branch["datasets"]) == set(counts)
        assert branch["num_target_tokens"] == sum(c["num_target_tokens"] for c in counts.values())
        assert (folder / "adapter_model.safetensors").is_file()
        engine = json.loads((folder / "engine.json").read_text())
        assert "measured in training" in json.dumps(engine)
        log = (folder / "engine.log").read_text()
        assert all(f"merit/loss/{dataset}" in log for dataset in counts)
        seen |= set(counts)
    assert seen == {"capitals", "codes", "plurals"}
    arms = json.loads((out / "evaluate/evaluate.json").read_text())["arms"]
    assert arms["merit"]["loss"] < arms["base"]["loss"]


def check_training(folder, name):
    """The model has moved, and split.json stands on gradients of 24 rows of three datasets."""
    before = read_tensor(folder / "BASE")
    after = read_tensor(folder / name)
    assert after.shape == before.shape and not after.equal(before)
    split = read_manifest(SplitManifest, folder / name / "split.json")
    assert {dataset.name for dataset in split.datasets} == {"capitals", "codes", "plurals"}
    assert {dataset.group for dataset in split.datasets} == {0, 1}
    assert sum(dataset.num_sketched_examples for dataset in split.datasets) == 24


def test_merge_branches(working_directory, run_example):
    for name in ("A", "B"):  # other tests find no branch.json in A and B
        shutil.copytree(working_directory / name, working_directory / f"branch-{name}")
    branches = ["--branch", "branch-A:300", "--branch", "branch-B:100"]
    printed = run_example("merge_branches.py", "of_branches", "--start", "BASE", *branches)
    assert printed.splitlines() == ["branch-A: 0.7500", "branch-B: 0.2500"]
    first, second = (read_tensor(working_directory / name) for name in ("A", "B"))
    merged = read_tensor(working_directory / "of_branches")
    assert merged.allclose(0.75 * first + 0.25 * second, rtol=0, atol=1e-6)


@pytest.fixture
def run_example(monkeypatch, capsys):
    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def read_tensor(model):
    """One weight of a model's directory."""
    name = "model.layers.1.mlp.down_proj.weight"
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor(name)
    raise AssertionError(f"{model}: holds no {name}")


def test_notebook(working_directory):
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text())
    names = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["history"][-1] < names["history"][0]
    assert names["sketches"].shape == (3, 65536)
    assert names["cosines"].diagonal().allclose(names["cosines"].new_ones(3))
