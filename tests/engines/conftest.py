"""A finished split whose branches other stacks train, in a folder of its own for every test."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT
from support.runs import run_values

from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run
from merit_fast.progress import SilentProgress

FAKE = Path(__file__).parents[1] / "support" / "stacks" / "fake_trainer.py"


@pytest.fixture(scope="session")
def split_folder(tmp_path_factory, tiny_model, tiny_mixture):
    folder = tmp_path_factory.mktemp("split")
    values = run_values(tiny_model, tiny_mixture)
    values["train"]["controls"] = {}
    values["train"]["epochs"] = 3
    del values["train"]["max_shard_size"]  # of the built-in trainer only
    (folder / "run.yml").write_text(yaml.safe_dump(values))
    run = Run(read_run_config(folder / "run.yml"), SilentProgress())
    run.sketch()
    run.split()
    run.data.load("train")  # keeps the tokenized rows
    return folder


@pytest.fixture
def split_run(split_folder, tmp_path, monkeypatch):
    """CONFIG.yml of a run that is split already."""
    folder = tmp_path / "run"
    shutil.copytree(split_folder, folder)
    monkeypatch.setenv("FAKE_TRAINER_CALLS", str(tmp_path / "calls.txt"))
    return folder / "run.yml"


@pytest.fixture
def by_command():
    """Assignments that train by the fake stack."""

    def assignments(kind="whole", more=""):
        command = f"{sys.executable} {FAKE} {{base}} {{out}} {kind} {{rows}} {{config}} {more}"
        return ["train.engine=command", f"train.engine_command='{command}'"]

    return assignments


@pytest.fixture
def environment(monkeypatch):
    """The stacks' processes find this tree, tell nobody, and read no hub."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
