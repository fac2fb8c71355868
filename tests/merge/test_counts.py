"""Counts by which merges weigh models that other stacks trained."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from merit_fast import merge_models
from merit_fast.errors import InputError
from merit_fast.integrations.branches import write_branch


@pytest.fixture
def models(tmp_path):
    """Two models in the folder of an export: weights 4 and 8."""
    folders = []
    for number, value in enumerate((4.0, 8.0)):
        folder = tmp_path / "groups" / "models" / f"group_{number}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        save_file({"weight": torch.full((4,), value)}, folder / "model.safetensors")
        folders.append(folder)
    return folders


def write_state(folder, **values):
    (folder / "trainer_state.json").write_text(json.dumps(values))


def write_groups(models, rows=(10, 30), tokens=(300, 100)):
    groups = [
        {"group": n, "model": str(model), "num_rows": rows[n], "num_target_tokens": tokens[n]}
        for n, model in enumerate(models)
    ]
    (models[0].parents[1] / "groups.json").write_text(json.dumps({"groups": groups}))


def merged(models, weights, out):
    summary = merge_models(models, weights, out=out)
    (file,) = out.glob("*.safetensors")
    return load_file(file)["weight"][0].item(), summary["weights_reason"]


def test_target_tokens_of_branch_json_come_first(models, tmp_path):
    write_groups(models)
    for model, tokens, seen in zip(models, (100, 300), (9, 1), strict=True):
        write_branch(model, tokens, start=models[0])
        write_state(model, num_input_tokens_seen=seen)
    value, reason = merged(models, "tokens", tmp_path / "out")
    assert value == 7.0 and reason == "token counts of each branch.json"


def test_input_tokens_of_the_trainer_state_come_next_and_are_called_so(models, tmp_path):
    write_groups(models)
    write_branch(models[0], 7, start=models[1])  # the other model has none, so it does not count
    for model, seen in zip(models, (600, 200), strict=True):
        write_state(model, num_input_tokens_seen=seen, epoch=1.0)
    value, reason = merged(models, "tokens", tmp_path / "out")
    assert value == 5.0
    assert reason.startswith("num_input_tokens_seen of each trainer_state.json: input tokens")
    assert "not the tokens in the loss" in reason


def test_the_rows_of_an_export_come_last_times_the_epochs_that_all_states_tell(models, tmp_path):
    write_groups(models)
    value, reason = merged(models, "tokens", tmp_path / "one")
    assert value == 5.0 and "in one epoch of its rows" in reason
    value, reason = merged(models, "samples", tmp_path / "rows")
    assert value == 7.0 and reason.startswith("num_rows of ")
    for broken in (float("nan"), -1.0, True, "3"):
        for model in models:
            write_state(model, num_input_tokens_seen=broken, epoch=broken)
        value, reason = merged(models, "tokens", tmp_path / f"broken {broken}")
        assert value == 5.0 and "in one epoch of its rows" in reason
    for model, epoch in zip(models, (1.0, 3.0), strict=True):
        write_state(model, num_input_tokens_seen=0, epoch=epoch)
    value, reason = merged(models, "tokens", tmp_path / "three")
    assert value == 6.0 and "times the epochs of each trainer_state.json" in reason


def test_models_without_a_common_count_are_refused(models, tmp_path):
    write_branch(models[0], 7, start=models[1])
    write_state(models[1], num_input_tokens_seen=5)
    rule = f"{models[1]}: has no branch.json to take its tokens from, and not every model has a"
    with pytest.raises(InputError, match=rule):
        merge_models(models, "tokens", out=tmp_path / "out")
    write_groups(models, tokens=(0, 5))
    with pytest.raises(InputError, match="num_target_tokens of .*: must be above 0, got 0"):
        merge_models(models, "tokens", out=tmp_path / "out")
    (models[0].parents[1] / "groups.json").write_text('{"groups": [1]}')
    with pytest.raises(InputError, match="groups: must be a list of groups that name their model"):
        merge_models(models, "tokens", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_automatic_weights_take_counts_of_branch_json_only(models, tmp_path):
    """Checkpoints of one run have a state too, and nobody has asked to weigh them by it."""
    for model, seen in zip(models, (600, 200), strict=True):
        write_state(model, num_input_tokens_seen=seen)
    value, reason = merged(models, "auto", tmp_path / "out")
    assert value == 6.0
    assert reason == "equal, because no model has a branch.json with token counts"


def test_an_adapter_next_to_the_config_of_its_base_is_an_adapter(models):
    from merit_fast.merge.read.adapters.folder import is_adapter

    folder = models[0]
    (folder / "adapter_config.json").write_text("{}")
    assert not is_adapter(folder)  # it holds a model's weights
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert not is_adapter(folder)  # nor does a shard without an index make it one
    (folder / "model-00001-of-00002.safetensors").rename(folder / "adapter_model.safetensors")
    assert is_adapter(folder)  # as axolotl saves it
