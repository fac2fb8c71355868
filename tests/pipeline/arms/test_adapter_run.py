"""A whole run whose branches are adapters: each stage reads them, and a killed one resumes."""

import contextlib
import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from support.checks import tree_bytes
from support.paths import KILL_AT
from support.runs import MEASURED, run_all, run_values
from support.warm import run_python

from merit_fast.errors import InputError
from merit_fast.model import load_model
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run

ADAPTER = {"kind": "dora", "rank": 2, "targets": ["q_proj", "down_proj"]}


def write_config(folder, model, mixture, **train):
    values = run_values(model, mixture)
    values["train"] |= {"adapter": ADAPTER, "learning_rate": 5e-3} | train
    values["train"]["controls"] = {"joint": True}
    values["evaluate"]["audit"] = True
    file = folder / "run.yml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory, tiny_model, tiny_mixture):
    folder = tmp_path_factory.mktemp("adapters")
    file = write_config(folder, tiny_model, tiny_mixture)
    with contextlib.chdir(folder):
        summary, _ = run_all(file)
    return folder, file, summary


def test_every_stage_reads_branches_of_adapters(adapter_run, tiny_model):
    folder, file, summary = adapter_run
    branches = [folder / "out" / "branches" / name for name in ("merit-0", "merit-1", "joint")]
    for branch in branches:
        assert (branch / "adapter_model.safetensors").exists()
        assert not (branch / "config.json").exists()
    arms = summary["arms"]
    assert arms["merit"]["loss"] < arms["base"]["loss"]
    assert arms["joint"]["displacement"] > 0
    assert arms["joint@0.5"]["displacement"] == pytest.approx(arms["joint"]["displacement"] / 2)
    with contextlib.chdir(folder):
        _, fresh = run_all(file)
    assert {"branches/merit-0", "merged/merit", "evaluate"} <= fresh
    base = load_model(str(tiny_model), "fp32").state_dict()
    ends = [load_model(str(branch), "fp32").state_dict() for branch in branches]
    counts = [
        json.loads((branch / "branch.json").read_text())["num_target_tokens"]
        for branch in branches[:2]
    ]
    merged = load_model(str(folder / "out" / "merged" / "merit"), "fp32").state_dict()
    for name, tensor in merged.items():
        parts = (count * end[name].double() for count, end in zip(counts, ends, strict=False))
        torch.testing.assert_close(tensor.double(), sum(parts) / sum(counts), rtol=1e-5, atol=1e-6)
    squares = sum(
        float((ends[2][name].double() - base[name].double()).square().sum())
        for name in base
        if name != "lm_head.weight"  # the embedding
    )
    assert arms["joint"]["displacement"] == pytest.approx(squares**0.5, rel=1e-6)
    audit = json.loads((folder / "out" / "audit" / "audit.json").read_text())["arms"]["merit"]
    result = json.loads((folder / "out" / "evaluate" / "evaluate.json").read_text())
    assert audit["branch_losses"] == pytest.approx(
        [result["branches"][f"merit-{group}"]["token_loss"] for group in (0, 1)], rel=1e-4
    )


def test_the_merged_model_asks_and_ends_as_the_branches_do(adapter_run):
    folder, _, _ = adapter_run
    branch = folder / "out" / "branches" / "merit-0"
    merged = folder / "out" / "merged" / "merit"
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        assert (merged / name).read_bytes() == (branch / name).read_bytes(), name


@pytest.mark.process
def test_a_killed_run_of_adapters_ends_with_the_same_bytes(adapter_run, tmp_path, tiny_model,
                                                           tiny_mixture):  # fmt: skip
    folder, _, _ = adapter_run
    file = write_config(tmp_path, tiny_model, tiny_mixture)
    command = [str(KILL_AT), "resume.safetensors", "2", "run", str(file)]
    assert run_python(command, cwd=tmp_path).returncode == -signal.SIGKILL
    assert list(tmp_path.rglob("resume.safetensors"))
    with contextlib.chdir(tmp_path):
        Run(read_run_config(Path("run.yml"))).train()
    ignored = (*MEASURED, "config.yml")
    whole = tree_bytes(folder / "out" / "branches", ignored)
    assert tree_bytes(tmp_path / "out" / "branches", ignored) == whole


BAD = {
    "targets": ("train.adapter.targets=[q_prj]", "targets: 'q_prj' must match a module"),
    "held out": (
        "train.evaluate_steps=2",
        "train.evaluate_steps: needs held-out rows of every dataset, capitals has none",
    ),
    "tracker": ("train.report_to=[tensorbord]", "train.report_to: must be among .*tensorboard"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_recipe_ends_the_run_before_its_first_stage(
    tmp_path, tiny_model, tiny_mixture, name
):
    assignment, message = BAD[name]
    first, *others = tiny_mixture
    first = {key: value for key, value in first.items() if key != "eval_path"}
    mixture = [first, *others] if name == "held out" else tiny_mixture
    file = write_config(tmp_path, tiny_model, mixture)
    with contextlib.chdir(tmp_path), pytest.raises(InputError, match=message):
        run_all(file, assignment)
    assert not (tmp_path / "out" / "sketch").exists()
