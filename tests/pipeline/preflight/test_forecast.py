"""`run --dry-run`: what a run would do, and that it does nothing."""

import json

import pytest
import yaml
from support.runs import Notes, run_values

import merit_fast.pipeline.preflight.rates as rates
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.preflight.base import num_parameters, num_trained_parameters
from merit_fast.pipeline.preflight.forecast import describe_forecast, forecast_run
from merit_fast.pipeline.run import Run
from merit_fast.train.config import TrainConfig


@pytest.fixture
def config_file(tmp_path, tiny_model, tiny_mixture, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(run_values(tiny_model, tiny_mixture)))
    return file


def forecast_of(file, *assignments):
    run = Run(read_run_config(file, assignments), Notes())
    forecast = forecast_run(run.outputs, run.data)
    return forecast, {stage.stage: stage for stage in forecast.stages}


def test_a_dry_run_shows_every_stage_and_writes_nothing(config_file, tmp_path, call):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call("run", config_file, "--dry-run")
    assert code == 0, err
    assert sorted(tmp_path.rglob("*")) == before
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["stage", "models", "rows", "tokens", "steps", "disk", "time"]
    assert [row[0] for row in rows[1:7]] == [
        "sketch", "split", "train", "merge", "evaluate", "report",
    ]  # fmt: skip
    assert "estimated from" in out and "FLOP/s" in out and "needed" in out
    code, out, err = call("run", config_file, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["stages"][2]["stage"] == "train", err
    code, _, err = call("run", config_file, "--dry-run", "split.groups=100")
    assert code == 2 and "split.groups: must be at most" in err


def test_the_forecast_agrees_with_the_run(config_file, tmp_path):
    _, before = forecast_of(config_file)
    run = Run(read_run_config(config_file), Notes())
    run.sketch()
    run.split()
    _, planned = forecast_of(config_file)
    assert planned["sketch"].up_to_date and planned["split"].up_to_date
    run.all()
    branches = [
        read_manifest(BranchManifest, file)
        for file in (tmp_path / "out/branches").glob("*/branch.json")
    ]
    assert planned["train"].models == len(branches)
    assert planned["train"].rows == sum(branch.num_examples for branch in branches)
    assert planned["train"].tokens == sum(branch.num_tokens for branch in branches)
    assert planned["train"].steps == sum(branch.steps for branch in branches)
    assert before["train"].rows >= planned["train"].rows  # equal branches are trained once
    size = sum(file.stat().st_size for file in (tmp_path / "out/branches").glob("*/*.safetensors"))
    assert planned["train"].bytes == pytest.approx(size, rel=0.1)
    done, stages = forecast_of(config_file)
    assert all(stage.up_to_date for stage in stages.values())
    assert done.seconds == 0 and done.needed_bytes == 0
    again, stages = forecast_of(config_file, "merge.weights=uniform")
    assert stages["train"].up_to_date and not stages["merge"].up_to_date
    assert again.rate.startswith("measured: this run trained")
    assert "up to date" in describe_forecast(again)


def test_warmup_seeds_and_automatic_groups_are_in_the_forecast(config_file):
    _, one = forecast_of(config_file, "split.groups=2")
    forecast, two = forecast_of(config_file, "train.seeds=2", "split.warmup=0.25")
    assert two["warmup"].models == 1 and two["warmup"].rows > 0
    assert two["train"].models == 2 * one["train"].models
    forecast, _ = forecast_of(config_file, "split.groups=auto")
    assert any("split.groups is auto" in note for note in forecast.notes)


def test_frozen_parameters_cost_no_backward(config_file, monkeypatch):
    monkeypatch.setattr(rates, "_matmul_flops", lambda dtype: 1e6)
    whole, stages = forecast_of(config_file)
    freeze = 'train.freeze=["layers"]'
    frozen, fewer = forecast_of(config_file, freeze)
    base = Run(read_run_config(config_file, [freeze]), Notes()).outputs.base
    parameters = num_parameters(base)
    trained = num_trained_parameters(base, TrainConfig(freeze=("layers",)))
    share = (2 * parameters + 4 * trained) / (6 * parameters)
    assert 0 < trained < parameters
    assert fewer["train"].seconds == pytest.approx(share * stages["train"].seconds, rel=0.01)
    assert fewer["evaluate"].seconds == stages["evaluate"].seconds
    assert "trained) and products" in frozen.rate and "trained)" not in whole.rate


def test_the_forecast_counts_the_bytes_of_stored_rows(config_file, tmp_path):
    words = ("split.store=true", "split.store_dim=4096", "split.examples=all")
    before, _ = forecast_of(config_file)
    forecast, stages = forecast_of(config_file, *words)
    assert forecast.needed_bytes - before.needed_bytes == stages["sketch"].bytes
    Run(read_run_config(config_file, words), Notes()).sketch()
    shards = (tmp_path / "out/sketch/rows").rglob("*.safetensors")
    written = sum(shard.stat().st_size for shard in shards)
    assert 0.9 * written < stages["sketch"].bytes < 1.1 * written
    assert forecast_of(config_file, *words)[1]["sketch"].up_to_date
