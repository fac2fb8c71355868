"""train.freeze: what stays as it is, and what is refused."""

import json

import pytest
import torch
from support.runs import run_all, run_values
from support.vision.layouts import LAYOUTS

from merit_fast.errors import InputError
from merit_fast.model import freeze_parameters, load_model, tower_parameters
from merit_fast.pipeline.preflight.base import num_trained_parameters
from merit_fast.train.config import TrainConfig


def frozen_of(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", LAYOUTS)
def test_by_default_tower_and_projector_are_frozen(vision_folders, name):
    model = load_model(str(vision_folders(name)), "fp32")
    frozen = freeze_parameters(model, None)
    assert set(frozen) == frozen_of(model) == set(tower_parameters(model))
    text = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("language_model" in key or "text_model" in key or "lm_head" in key for key in text)
    assert not any("language_model" in key or "text_model" in key for key in frozen)
    assert frozen and text


def test_a_model_of_text_has_no_tower(tiny_model):
    model = load_model(str(tiny_model), "fp32")
    assert freeze_parameters(model, None) == () and not frozen_of(model)


def test_expressions_and_the_empty_list(vision_folders):
    model = load_model(str(vision_folders("qwen2_5_vl")), "fp32")
    assert freeze_parameters(model, []) == ()
    freeze_parameters(model, [r"layers\.0\.", "embed_tokens"])
    expected = {n for n, _ in model.named_parameters() if "layers.0." in n or "embed_tokens" in n}
    assert frozen_of(model) == expected


def test_a_tied_head_is_frozen_by_either_name(tiny_model):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    freeze_parameters(model, ["lm_head"])
    assert not model.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize(
    "freeze,message",
    [
        (["no_such"], "train.freeze: 'no_such' must match a parameter; the first is model."),
        ([""], "train.freeze: must leave a parameter to train"),
    ],
)
def test_expressions_that_do_not_fit_the_model(tiny_model, freeze, message):
    model = load_model(str(tiny_model), "fp32")
    with pytest.raises(InputError, match=message):
        freeze_parameters(model, freeze)


def test_a_broken_expression_is_refused_with_the_config():
    with pytest.raises(InputError, match=r"freeze: must be regular expressions, got '\['"):
        TrainConfig(freeze=("[",))


def test_frozen_parameters_need_no_state(tiny_model):
    from merit_fast.train.optimizer import MasterAdamW

    model = load_model(str(tiny_model), "fp32")
    freeze_parameters(model, ["layers.0"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MasterAdamW(model, TrainConfig(weight_decay=0.5))
    assert not any("layers.0" in name for name in optimizer.names)
    sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step(0.1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("layers.0" in name)


@pytest.mark.parametrize("freeze", [None, [], ["layers.0", "visual"]])
def test_the_forecast_counts_what_is_trained(vision_folders, freeze):
    folder = vision_folders("qwen2_5_vl")
    model = load_model(str(folder), "fp32")
    freeze_parameters(model, freeze)
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert num_trained_parameters(folder, TrainConfig(freeze=freeze)) == expected


def test_a_wrong_expression_is_refused_before_anything_runs(tiny_model, tiny_mixture, tmp_path):
    values = run_values(tiny_model, tiny_mixture) | {"output": str(tmp_path / "out")}
    values["train"] = values["train"] | {"freeze": ["visual"]}
    file = tmp_path / "run.yml"
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match="train.freeze: 'visual' must match a parameter"):
        run_all(file)
    assert not list((tmp_path / "out").glob("sketch/*.safetensors"))
