"""`run --dry-run`: what a run would do, and that it does nothing."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from support.runs import Notes, run_values
from support.training import CONFIG, dataset, held_out_rows, job, stop_after

import merit_fast.pipeline.preflight.rates as rates
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.preflight import disk
from merit_fast.pipeline.preflight.base import num_parameters, num_trained_parameters
from merit_fast.pipeline.preflight.forecast import describe_forecast, forecast_run
from merit_fast.pipeline.run import Run
from merit_fast.progress import SilentProgress
from merit_fast.train import train_branch
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


def test_the_disk_has_to_hold_the_spans_of_one_dataset(config_file, tmp_path):
    words = ("split.store=true", "split.store_dim=4096", "split.examples=6")
    before, _ = forecast_of(config_file, *words)
    forecast, _ = forecast_of(config_file, *words, "split.span=2")
    run = Run(read_run_config(config_file, [*words, "split.span=2"]), Notes())
    name = next(iter(run.outputs.contents))
    run.work.sketch(tmp_path / "share", only=name, share=(1, 1))
    written = sum(file.stat().st_size for file in (tmp_path / "share").rglob("*.safetensors"))
    assert 0.9 * written < forecast.needed_bytes - before.needed_bytes < 1.1 * written


ADAPTER = "train.adapter={kind: lora, rank: 2, targets: [q_proj]}"


def test_operations_of_an_adapter_and_of_passes_that_run_again(config_file, monkeypatch):
    monkeypatch.setattr(rates, "_matmul_flops", lambda dtype: 1e6)
    _, plain = forecast_of(config_file)
    base = Run(read_run_config(config_file), Notes()).outputs.base
    parameters = num_parameters(base)
    adapter = read_run_config(config_file, [ADAPTER]).train
    trained = num_trained_parameters(base, adapter)
    cases = {
        "train.gradient_checkpointing=true": 8 / 6,
        "train.update_in_backward=two-pass": 10 / 6,
        ADAPTER: (4 * parameters + 4 * trained) / (6 * parameters),
    }
    for assignment, share in cases.items():
        _, stages = forecast_of(config_file, assignment)
        seconds = {name: stage.seconds for name, stage in stages.items()}
        assert seconds["train"] == pytest.approx(share * plain["train"].seconds, rel=0.01)
        assert seconds["sketch"] == plain["sketch"].seconds
        assert seconds["evaluate"] == plain["evaluate"].seconds


def test_the_rate_counts_all_steps_of_a_branch_that_stopped_early(config_file, monkeypatch):
    branch = SimpleNamespace(base_fingerprint="", num_tokens=100, steps=4, steps_run=None)
    rate = {}
    run = Run(read_run_config(config_file), Notes())
    run.all()
    branch.base_fingerprint = run.outputs.base_fingerprint
    monkeypatch.setattr(rates, "read_manifest", lambda *_: branch)
    for branch.steps_run in (None, 8):
        outputs = Run(read_run_config(config_file), Notes()).outputs
        rate[branch.steps_run] = rates.rate_of(outputs, 100, 100).train_s
    assert rate[8] == pytest.approx(rate[None] / 2)


def test_a_warmup_of_adapters_writes_a_whole_model(config_file):
    _, stages = forecast_of(config_file, ADAPTER, "split.warmup=0.25")
    parameters = num_parameters(Run(read_run_config(config_file), Notes()).outputs.base)
    assert stages["train"].bytes == pytest.approx(4 * parameters, rel=0.1)
    _, without = forecast_of(config_file, ADAPTER)
    assert stages["train"].bytes - without["train"].bytes == 4 * parameters


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_forecast_counts_checkpoint_and_best_weights(tmp_path, tiny_model, optimizer, dtype,
                                                         monkeypatch):  # fmt: skip
    config = replace(
        CONFIG, optimizer=optimizer, dtype=dtype, checkpoint_steps=2, evaluate_steps=1, patience=9
    )
    work = replace(job(tiny_model, dataset("a", 0)), held_out=(held_out_rows(),))
    stop_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_branch(work, config, tmp_path, SilentProgress())
    files = ("resume.safetensors", "best.safetensors")
    size = sum((tmp_path / name).stat().st_size for name in files)
    needed = num_parameters(tiny_model) * disk._checkpoint_bytes(config, 6)
    assert size < 1.1 * needed and needed < 1.3 * size
    assert disk._checkpoint_bytes(config, 2) == (2 if dtype == "bf16" else 4)


def test_only_groups_of_a_split_mix_the_rows_of_others(config_file):
    _, plain = forecast_of(config_file, "train.controls={iid: 1}")
    _, mixed = forecast_of(config_file, "train.controls={iid: 1}", "train.mix=0.5")
    assert mixed["train"].rows == pytest.approx(plain["train"].rows * (1.5 + 1) / 2, rel=0.02)
