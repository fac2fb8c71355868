"""Trackers of a branch: each step, the recipe, and a run for each branch."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
from support.training import CONFIG, dataset, held_out_rows, job, read_metrics, train

from merit_fast.errors import InputError
from merit_fast.progress import SilentProgress
from merit_fast.train import train_branch


def test_trackers_get_every_step_under_the_names_of_the_datasets(tiny_model, tmp_path, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    events = []
    shown = {}

    class Recorder(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            events.append(("begin", args.run_name, state.max_steps, type(model).__name__))
            shown.update(args.to_dict())

        def on_log(self, args, state, control, logs=None, **kwargs):
            events.append((state.global_step, logs))

        def on_train_end(self, args, state, control, model=None, **kwargs):
            events.append(("end", type(model).__name__))

    registry = integration_utils.INTEGRATION_TO_CALLBACK | {"recorder": Recorder}
    monkeypatch.setattr(integration_utils, "INTEGRATION_TO_CALLBACK", registry)
    config = replace(CONFIG, report_to=("recorder",), evaluate_steps=3, epochs=1)
    work = replace(job(tiny_model, dataset("a", 0)), held_out=(held_out_rows(),))
    train_branch(work, config, tmp_path, SilentProgress())
    assert events[0][:3] == ("begin", "merit-0", 3) and events[-1] == ("end", events[0][3])
    wanted = dict(learning_rate=1e-3, num_train_epochs=1, max_steps=3, adam_beta2=0.98)
    assert {key: shown[key] for key in wanted} == wanted
    assert shown["per_device_train_batch_size"] * shown["gradient_accumulation_steps"] == 4
    logged = events[1:-1]
    assert [step for step, _ in logged] == [1, 2, 3, 3]
    lines = read_metrics(tmp_path)
    assert logged[0][1]["loss_a"] == lines[0]["dataset_losses"][0]
    assert logged[0][1]["grad_norm"] == lines[0]["norm"]
    assert logged[3][1]["eval_loss"] == lines[3]["held_out_loss"]


class FakeRun:
    def __init__(self, name):
        self.name = name
        self.steps = []

    def _label(self, code):
        pass


class FakeWandb(ModuleType):
    """The part of wandb that transformers' callback calls."""

    ConfigError = ValueError

    def __init__(self):
        super().__init__("wandb")
        self.run = None
        self.config = {}
        self.runs = []

    def init(self, project, name):
        self.run = FakeRun(name)
        self.runs.append(self.run)

    def finish(self):
        self.run = None

    def log(self, values):
        self.run.steps.append(values["train/global_step"])


@pytest.fixture
def wandb(monkeypatch):
    from transformers.integrations import integration_utils

    package = FakeWandb()
    for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    return package


def test_every_branch_of_a_process_has_a_run_of_its_own(tiny_model, tmp_path, wandb):
    """The callback of transformers leaves its run open and writes into one that is open."""
    config = replace(CONFIG, report_to=("wandb",), epochs=1)
    for name in ("merit-0", "merit-1"):
        (tmp_path / name).mkdir()
        work = replace(job(tiny_model, dataset("a", 0)), branch=name)
        train_branch(work, config, tmp_path / name, SilentProgress())
    assert {run.name: run.steps for run in wandb.runs} == {
        "merit-0": [1, 2, 3],
        "merit-1": [1, 2, 3],
    }
    assert wandb.run is None


def test_a_run_that_was_open_before_stays_open(tiny_model, tmp_path, wandb):
    wandb.init("huggingface", "mine")
    config = replace(CONFIG, report_to=("wandb",), epochs=1)
    train(tiny_model, tmp_path / "out", config, dataset("a", 0))
    assert wandb.run.name == "mine" and wandb.run.steps == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "message"), [("tensorbord", "must be among .*wandb"), ("dvclive", "cannot be used")]
)
def test_a_tracker_that_cannot_run_is_refused_before_the_training(
    tiny_model, tmp_path, name, message
):
    with pytest.raises(InputError, match=f"train.report_to: {name if 'used' in message else ''}"):
        train(tiny_model, tmp_path / "out", replace(CONFIG, report_to=(name,)), dataset("a", 0))
    assert list((tmp_path / "out").iterdir()) == []
