"""Averages along a run: which checkpoints, in which order, by which weights."""

import json
import math
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from merit_fast.cli.main import main
from merit_fast.errors import InputError
from merit_fast.merge import merge_trajectory
from merit_fast.merge.trajectory import decay_weights, read_trajectory

STEPS = (5, 10, 100, 20)


def run_main(words, monkeypatch):
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["merit-fast", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def value(step):
    return torch.full((3, 2), float(step), dtype=torch.float32)


@pytest.fixture
def run(tmp_path):
    """A run's folders of safetensors, ckpt-5 to ckpt-100; their weights are their steps."""
    for step in STEPS:
        folder = tmp_path / f"ckpt-{step}"
        folder.mkdir()
        save_file({"w": value(step)}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def merged(run, **options):
    summary = merge_trajectory(str(run / "ckpt-*"), out=run / "out", **options)
    return load_file(run / "out" / "model.safetensors")["w"], summary


def integral(decay, low, high, count=20_000):
    """The mean of a function, by midpoints."""
    width = (high - low) / count
    return sum(decay(low + (k + 0.5) * width) for k in range(count)) / count


@pytest.mark.parametrize(
    "schedule,decay", [("linear", lambda x: 1 - x), ("minus-sqrt", lambda x: 1 - math.sqrt(x))]
)
def test_a_decay_is_what_the_learning_rate_would_have_done(run, schedule, decay):
    """θ_0 plus each update times the mean of the decay while it was made."""
    steps = sorted(STEPS)
    places = [(step - steps[0]) / (steps[-1] - steps[0]) for step in steps]
    wanted = float(steps[0])
    for i in range(1, len(steps)):
        wanted += integral(decay, places[i - 1], places[i]) * (steps[i] - steps[i - 1])
    got, summary = merged(run, schedule=schedule)
    assert got.flatten().tolist() == pytest.approx([wanted] * 6, rel=1e-6)
    assert [row[0] for row in summary["trajectory"]] == steps
    assert sum(row[1] for row in summary["trajectory"]) == pytest.approx(1)


def test_uniform_and_the_latest_in_the_order_of_numbers(run):
    got, summary = merged(run, last=2)
    assert got[0, 0] == 60 and [row[:2] for row in summary["trajectory"]] == [[20, 0.5], [100, 0.5]]
    assert summary["schedule"] == "uniform"


def test_ema_equals_the_loop(run):
    mean = 5.0
    for step in (10, 20, 100):
        mean = 0.7 * mean + 0.3 * step
    assert merged(run, schedule="ema:0.7")[0][1, 1] == pytest.approx(mean, rel=1e-6)


def test_a_file_names_each_checkpoint(run):
    file = run / "weights.txt"
    file.write_text("# by hand\nckpt-5 1\nckpt-10 2\n\nckpt-20 0\nckpt-100 5\n")
    assert merged(run, schedule=str(file))[0][0, 0] == (5 + 20 + 500) / 8


@pytest.mark.parametrize(
    "text,message",
    [
        ("ckpt-5 1\nckpt-10 2\nckpt-20 0\n", "'ckpt-100': has no weight"),
        ("ckpt-5 1\nckpt-10 2\nckpt-20 0\nckpt-100 1\nckpt-7 1\n", "'ckpt-7': is no checkpoint"),
        ("ckpt-5 1\nckpt-5 2\n", "line 2: 'ckpt-5' stands twice"),
        ("ckpt-5 nan\n", "line 1: must be a name and a number, got 'ckpt-5 nan'"),
        ("ckpt-5 1\nckpt-10 -1\nckpt-20 0\nckpt-100 0\n", "must have a sum other than 0"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(run, text, message):
    file = run / "weights.txt"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        merged(run, schedule=str(file))
    assert not (run / "out").exists()


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"schedule": "cosine"},
            "must be one of uniform, linear, minus-sqrt, ema:BETA, or",
        ),
        ({"schedule": "ema:1"}, "BETA must be from 0 to below 1, got '1'"),
        ({"last": 5}, "last must be 1 to 4, got 5"),
        ({"last": 0}, "last must be 1 to 4, got 0"),
    ],
)
def test_wrong_options_are_refused(run, options, message):
    with pytest.raises(InputError, match=message):
        merged(run, **options)


@pytest.mark.parametrize(
    "names,pattern,message",
    [
        ([], "none-*", "names no checkpoint"),
        (["ckpt-5.log"], "ckpt-*", "must differ from|is no directory"),
        (["ckpt-010/"], "ckpt-*", "are of the same step 10"),
        (["ckpt-final/"], "ckpt-*", "must differ from .* in one number"),
    ],
)
def test_what_is_no_trajectory_is_refused(run, names, pattern, message):
    for name in names:
        (run / name).mkdir() if name.endswith("/") else (run / name).write_text("")
    with pytest.raises(InputError, match=message) as error:
        read_trajectory(str(run / pattern))
    assert "\n" not in str(error.value)


def test_weights_of_a_decay_sum_to_one():
    assert decay_weights([0.9, 0.5, 0.1]) == pytest.approx((0.1, 0.4, 0.4, 0.1))


def test_distributed_checkpoints_along_a_run(tmp_path):
    for step in (9, 10):
        state = {"model": {"a.weight": value(step)}, "optimizer": {"m": value(0)}, "step": step}
        dcp.save(state, checkpoint_id=tmp_path / f"step_{step}", no_dist=True)
    summary = merge_trajectory(str(tmp_path / "step_*"), out=tmp_path / "out", form="distcp")
    state = {"model": {"a.weight": value(0)}}
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert torch.equal(state["model"]["a.weight"], torch.full((3, 2), 9.5))
    assert [row[0] for row in summary["trajectory"]] == [9, 10]


def test_the_command_lists_steps_and_weights(run, capsys, monkeypatch):
    words = ["merge", str(run / "out"), "--trajectory", str(run / "ckpt-*"), "--last", "2"]
    assert run_main(words, monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "trajectory: steps 20, 100; schedule uniform" in shown and "weight 0.500000" in shown
    assert run_main([*words, "--json", "--schedule", "ema:0.5"], monkeypatch) == 0
    rows = json.loads(capsys.readouterr().out)["trajectory"]
    assert [row[:2] for row in rows] == [[20, 0.5], [100, 0.5]]
    for extra in (["--model", "x"], ["--weights", "uniform"]):
        assert run_main([*words, *extra], monkeypatch) == 2
        assert "--trajectory" in capsys.readouterr().err
    assert run_main(["merge", "x", "--model", "y", "--last", "2"], monkeypatch) == 2
    assert "--schedule and --last go with --trajectory" in capsys.readouterr().err


def test_a_yaml_file_names_pattern_schedule_and_options(run, capsys, monkeypatch):
    file = run / "average.yml"
    lines = [f"trajectory: {run}/ckpt-*", "schedule: ema:0.5", "last: 3", "merge: {dtype: fp16}"]
    file.write_text("\n".join(lines))
    words = ["merge", str(run / "out"), "--json", "--trajectory", str(file)]
    assert run_main(words, monkeypatch) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [row[:2] for row in summary["trajectory"]] == [[10, 0.25], [20, 0.25], [100, 0.5]]
    assert summary["dtype"] == "fp16"
    assert run_main([*words, "--last", "1", "--dtype", "fp32"], monkeypatch) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [row[0] for row in summary["trajectory"]] == [100] and summary["dtype"] == "fp32"
    for text, message in (
        ("schedule: uniform", "trajectory: is required"),
        (f"trajectory: {run}/ckpt-*\nlats: 3", "lats: unknown key; did you mean last"),
        (f"trajectory: {run}/ckpt-*\nmerge: {{weights: uniform}}", "merge.weights: must be auto"),
    ):
        file.write_text(text)
        assert run_main(words, monkeypatch) == 2
        assert message in capsys.readouterr().err
