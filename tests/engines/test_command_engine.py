"""`merit-fast train --engine command`: any stack's model becomes a branch like a built-in one."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run


def branch_json(config: Path, name: str) -> dict:
    return json.loads((config.parent / "out" / "branches" / name / "branch.json").read_text())


def test_a_branch_of_a_command_is_merged_measured_and_verified_as_a_built_in_one(
    call, split_run, by_command, tmp_path
):
    code, _, error = call("train", split_run, *by_command())
    assert code == 0, error
    assert "52 target tokens" not in error  # of one epoch; the state says three
    built_in = split_run.parent / "built-in"
    config = read_run_config(split_run, [f"output={built_in}"])
    shutil.copytree(split_run.parent / "out", built_in)
    shutil.rmtree(built_in / "branches")
    Run(config).train()
    for name in ("merit-0", "merit-1"):
        own = json.loads((built_in / "branches" / name / "branch.json").read_text())
        found = branch_json(split_run, name)
        assert found["steps"] == 12
        for key in own.keys() - {"steps"}:
            assert found[key] == own[key], key
    losses = json.loads((split_run.parent / "out/branches/merit-0/losses.json").read_text())
    assert losses == [3.5, 2.5]
    code, out, error = call("merge", split_run, *by_command(), "--json")
    assert code == 0, error
    merged = tmp_path / "merged"
    code, out, error = call("merge", merged, "--run", split_run.parent / "out", "--json")
    assert code == 0, error
    counts = [branch_json(split_run, f"merit-{k}")["num_target_tokens"] for k in range(2)]
    weights = [count / sum(counts) for count in counts]
    assert json.loads(out)["weights"] == pytest.approx(weights)
    base = load_file(next(Path(config.model).glob("*.safetensors")))
    name = next(iter(base))
    shift = load_file(next(merged.glob("*.safetensors")))[name] - base[name]
    assert shift == pytest.approx(0.01 * weights[0] + 0.02 * weights[1], abs=1e-6)
    for words in (("verify", split_run.parent / "out"), ("evaluate", split_run, *by_command())):
        code, _, error = call(*words)
        assert code == 0, error
    code, out, _ = call("status", split_run, *by_command(), "--json")
    states = {row["name"]: row["state"] for row in json.loads(out)["outputs"]}
    assert states["branches/merit-0"] == states["branches/merit-1"] == "up to date"


def test_a_finished_branch_stays_until_what_trains_it_changes(call, split_run, by_command):
    calls = split_run.parent.parent / "calls.txt"
    for _ in range(2):
        assert call("train", split_run, *by_command())[0] == 0
    assert len(calls.read_text().splitlines()) == 2
    code, _, error = call("train", split_run, *by_command(more="--lr 1"))
    assert code == 0 and "train.engine_command" in error
    assert len(calls.read_text().splitlines()) == 4
    assert (
        call("merge", split_run)[0] == 1
    )  # of the built-in trainer's branches, which are not there


def test_a_stack_that_fails_registers_nothing_and_resumes_from_its_last_whole_checkpoint(
    call, split_run, by_command
):
    code, _, error = call("train", split_run, *by_command("crash-once"))
    log = split_run.parent / "out/branches/merit-0.tmp/work/engine.log"
    assert code == 1
    assert error.splitlines()[-1] == (
        "failed: train merit-0: command ended with exit code 3: CUDA out of memory, or so; "
        f"its log: {log}"
    )
    assert not (split_run.parent / "out/branches/merit-0").exists()
    assert call("merge", "OUT", "--run", split_run.parent / "out")[0] == 2
    code, out, _ = call("status", split_run, *by_command("crash-once"), "--json")
    states = {row["name"]: row["state"] for row in json.loads(out)["outputs"]}
    assert states["branches/merit-0"] == "unfinished"
    first = yaml.safe_load((log.parent / "config.yml").read_text())
    assert "resume_from_checkpoint" not in first
    code, _, error = call("train", split_run, *by_command("crash-once"))
    assert code == 1 and "train merit-1" in error  # merit-0 is whole now
    record = json.loads((split_run.parent / "out/branches/merit-0/engine.json").read_text())
    assert record["config"]["resume_from_checkpoint"].endswith(
        "merit-0.tmp/work/model/checkpoint-6"
    )
    assert call("train", split_run, *by_command("crash-once"))[0] == 0


@pytest.mark.parametrize(
    "kind, words",
    [
        ("nothing", "must hold a model or an adapter, found no folder"),
        ("untrained", "nothing was trained"),
        ("other-shape", "shape"),
        ("foreign-branch", f"start_fingerprint: must be .*, got {'1' * 32}"),
        ("other-base", "base_model_name_or_path: must be"),
    ],
)
def test_what_comes_back_is_checked_before_it_is_registered(
    call, split_run, by_command, kind, words
):
    code, _, error = call("train", split_run, *by_command(kind))
    line = error.splitlines()[-1]
    assert code == 1 and re.search(words, line), error
    assert not (split_run.parent / "out/branches/merit-0").exists()


@pytest.mark.parametrize("kind", ["adapter", "in-checkpoint"])
def test_an_adapter_and_a_last_checkpoint_are_branches_too(call, split_run, by_command, kind):
    code, _, error = call("train", split_run, *by_command(kind))
    assert code == 0, error
    names = {path.name for path in (split_run.parent / "out/branches/merit-0").iterdir()}
    assert ("adapter_config.json" in names) == (kind == "adapter")
    assert ("config.json" in names) == (kind == "in-checkpoint")
    assert not any(name.startswith(("checkpoint", "work")) for name in names)
    assert call("merge", split_run, *by_command(kind))[0] == 0


def test_controls_and_seeds_are_trained_too_with_seeds_of_their_own(call, split_run, by_command):
    words = [*by_command(), "train.controls={joint: true, joint_low: 0.5}", "train.seeds=2"]
    code, _, error = call("train", split_run, *words)
    assert code == 0, error
    folder = split_run.parent / "out/branches"
    configs = {
        path.name: json.loads((path / "engine.json").read_text())["config"]
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".")
    }
    assert len(configs) == 8
    assert configs["merit-0"]["seed"] == 0 and configs["merit-0.seed1"]["seed"] == 1
    assert configs["joint"]["learning_rate"] == 2 * configs["joint-low"]["learning_rate"] == 1e-3
    joint = branch_json(split_run, "joint")["num_target_tokens"]
    parts = [branch_json(split_run, f"merit-{k}")["num_target_tokens"] for k in range(2)]
    assert joint == sum(parts)


def test_an_adapter_of_the_run_is_in_the_configuration_of_the_stack(call, split_run, by_command):
    adapter = "train.adapter={kind: rslora, rank: 2, targets: [q_proj, down_proj]}"
    code, _, error = call("train", split_run, *by_command("adapter"), adapter)
    assert code == 0, error
    record = json.loads((split_run.parent / "out/branches/merit-0/engine.json").read_text())
    expected = {
        "use_peft": True,
        "lora_r": 2,
        "lora_target_modules": ["q_proj", "down_proj"],
        "use_rslora": True,
        "use_dora": False,
    }
    assert {key: record["config"][key] for key in expected} == expected
