"""`merit-fast train --engine trl`: TRL trains packed LoRA branches of a run."""

import json

import pytest
import yaml

pytestmark = pytest.mark.process


@pytest.fixture
def own_config(tmp_path):
    values = {
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "packing": True,
        "max_length": 64,
        "bf16": False,
        "use_cpu": True,
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "down_proj"],
        "logging_steps": 1,
        "seed": 5,
    }
    file = tmp_path / "trl.yml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_packed_lora_branches_of_trl_are_merged_and_measured(call, split_run, own_config):
    words = ["train.engine=trl", f"train.engine_config={own_config}"]
    code, _, error = call("train", split_run, *words)
    assert code == 0, error
    assert "not used: train.epochs, train.learning_rate, train.batch_size, train.dtype" in error
    out = split_run.parent / "out"
    for name, tokens in (("merit-0", 52), ("merit-1", 64)):
        folder = out / "branches" / name
        branch = json.loads((folder / "branch.json").read_text())
        # TRL also trains the line break that ends each of the 16 completions.
        assert branch["num_target_tokens"] == 2 * (tokens + 16)
        assert branch["num_examples"] == 32
        assert branch["seed"] == 0 and branch["steps"] > 0
        assert (folder / "adapter_model.safetensors").is_file()
        record = json.loads((folder / "engine.json").read_text())
        assert record["tokens"] == "measured in training (branch.json)"
        assert record["config"]["seed"] == 5 and record["config"]["use_peft"] is True
        log = (folder / "engine.log").read_text()
        assert "kernels: rms_norm x 5" in log
        assert all(f"merit/loss/{dataset}" in log for dataset in branch["datasets"])
        losses = json.loads((folder / "losses.json").read_text())
        assert len(losses) == branch["steps"] and losses[-1] < losses[0]
    code, _, error = call("merge", split_run, *words)
    assert code == 0, error
    code, _, error = call("evaluate", split_run, *words)
    assert code == 0, error
    arms = json.loads((out / "evaluate" / "evaluate.json").read_text())["arms"]
    assert arms["merit"]["loss"] < arms["base"]["loss"]


def test_a_misspelt_key_of_trl_ends_the_run_before_a_branch_is_trained(call, split_run, own_config):
    own_config.write_text("learning_rat: 1.0e-3\n")
    code, _, error = call(
        "train", split_run, "train.engine=trl", f"train.engine_config={own_config}"
    )
    rule = "trl.yml: learning_rat: trl has no such key; did you mean learning_rate?"
    assert code == 2 and rule in error, error
    assert not list((split_run.parent / "out").glob("branches/*"))


def test_trl_trains_the_adapter_of_the_run_without_a_configuration_of_its_own(call, split_run):
    adapter = "train.adapter={kind: lora, rank: 4, targets: [q_proj, down_proj]}"
    code, _, error = call("train", split_run, "train.engine=trl", adapter, "train.epochs=1")
    assert code == 0, error
    folder = split_run.parent / "out" / "branches" / "merit-0"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4 and set(config["target_modules"]) == {"q_proj", "down_proj"}
