"""Merges of distributed checkpoints that torch wrote, against the tensors that it was given."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.merge.dcp.checks import assert_same, expected_grid, mean
from support.merge.dcp.tensors import SEEDS

from merit_fast.errors import InputError
from merit_fast.merge import load_merged, merge_models


def grids(saved):
    return [saved / f"grid-{name}" for name in SEEDS]


def test_chunks_of_any_mesh_become_whole_tensors(saved, tmp_path, backend):
    options = {"subtree": "model", "config_from": str(saved / "model-1")}
    merge_models(grids(saved), out=tmp_path / "out", **options)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), expected_grid())


def test_a_trainer_checkpoint_equals_the_model_that_it_saved(saved, tmp_path, backend):
    """accelerate keeps the weights in a folder of checkpoint-N; the optimizer has its own."""
    models = [saved / f"model-{name}" for name in SEEDS]
    merge_models(models, [0.3, 0.7], out=tmp_path / "whole")
    wanted = load_file(tmp_path / "whole" / "model.safetensors")
    for number, paths in enumerate(
        (
            [saved / f"checkpoint-{name}" for name in SEEDS],
            [saved / "flat-1", saved / "checkpoint-2"],
            [saved / f"sharded-{name}" for name in SEEDS],
            [saved / "checkpoint-1" / "pytorch_model_fsdp_0", models[1]],
        )
    ):
        out = tmp_path / f"out{number}"
        merge_models(paths, [0.3, 0.7], out=out, config_from=str(models[0]))
        assert_same(load_file(out / "model.safetensors"), wanted)
        assert (out / "config.json").read_text() == (models[0] / "config.json").read_text()


def test_ties_sees_whole_tensors(saved, tmp_path):
    models = [saved / f"model-{name}" for name in SEEDS]
    trained = [saved / f"checkpoint-{name}" for name in SEEDS]
    options = {"method": "ties", "density": 0.3, "base": models[0]}
    merge_models(models, out=tmp_path / "whole", **options)
    merge_models(trained, out=tmp_path / "out", **options)
    wanted = load_file(tmp_path / "whole" / "model.safetensors")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), wanted)


def test_a_merge_of_distributed_checkpoints_loads_as_a_model(saved):
    from transformers import AutoModelForCausalLM

    paths = [saved / f"checkpoint-{name}" for name in SEEDS]
    model = load_merged(paths, config_from=str(saved / "model-1"))
    wholes = [AutoModelForCausalLM.from_pretrained(saved / f"model-{name}") for name in SEEDS]
    states = [whole.state_dict() for whole in wholes]
    wanted = {name: mean([state[name] for state in states]) for name in states[0]}
    assert_same(model.state_dict(), wanted)


def test_the_config_above_the_checkpoint_is_found(saved, tmp_path):
    run = tmp_path / "checkpoint-7"
    shutil.copytree(saved / "checkpoint-1", run)
    shutil.copy(saved / "model-1" / "config.json", run)
    for number, path in enumerate((run, run / "pytorch_model_fsdp_0")):
        merge_models([path], out=tmp_path / f"out{number}")
        assert (tmp_path / f"out{number}" / "config.json").exists()


@pytest.mark.parametrize(
    "name,options,message",
    [
        (
            "checkpoint-1",
            {},
            r"has no config.json, .* one by config_from=",
        ),
        ("grid-1", {"subtree": "modle"}, r"has no dict 'modle'; tensors lie in model \(13\)"),
        ("", {}, r"holds 3 distributed checkpoints; name one: flat-1"),
    ],
)
def test_what_cannot_be_guessed_is_asked(saved, tmp_path, name, options, message):
    with pytest.raises(InputError, match=message) as error:
        merge_models([saved / name], out=tmp_path / "out", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_model_and_its_average_are_a_choice(saved, tmp_path):
    import torch.distributed.checkpoint as dcp

    state = {"model.embed_tokens.weight": torch.ones(37, 24)}
    dcp.save({"model": state, "ema": state}, checkpoint_id=tmp_path / "two", no_dist=True)
    options = {"out": tmp_path / "out", "config_from": str(saved / "model-1")}
    message = r"holds more than one dict of tensors; tensors lie in model \(1\), ema \(1\); name"
    with pytest.raises(InputError, match=message):
        merge_models([tmp_path / "two"], **options)
    merge_models([tmp_path / "two"], **options, subtree="ema")


def test_names_of_another_framework_need_a_word(saved, tmp_path):
    import torch.distributed.checkpoint as dcp

    state = {"decoder.layers.0.weight": torch.ones(3, 5)}
    dcp.save(state, checkpoint_id=tmp_path / "megatron", no_dist=True)
    message = "decoder.layers.0.weight: the names are not those of .*config.json"
    with pytest.raises(InputError, match=message):
        merge_models(
            [tmp_path / "megatron"], out=tmp_path / "out", config_from=str(saved / "model-1")
        )
    assert not (tmp_path / "out").exists()
