"""Configs that do not fit each other, and tied heads."""

import json

import pytest
from support.merge.configs import config_of
from support.merge.headers import one_tensor, pack, tensor, write_model

from merit_fast.errors import InputError
from merit_fast.merge.read.checkpoint import read_checkpoint
from merit_fast.merge.read.companions import (
    check_configs,
    find_head,
    is_tied,
    untie_if_different,
)


# ---- models whose configs do not fit
def models(tmp_path, *configs, tensors=None):
    result = []
    for number, config in enumerate(configs):
        content = one_tensor() if tensors is None else tensors[number]
        model = write_model(tmp_path / str(number), {"model.safetensors": content})
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            (model / "config.json").write_text(text)
        result.append(read_checkpoint(model))
    return result


@pytest.mark.parametrize(
    "first,second,message",
    [
        (
            {"hidden_size": 8},
            {"text_config": {"hidden_size": 9}},
            "hidden_size: must be 8 .* got 9",
        ),
        (
            {"num_hidden_layers": 2},
            {"num_hidden_layers": 3},
            "num_hidden_layers: must be 2 .* got 3",
        ),
        (
            {"model_type": "llama"},
            {"model_type": "qwen2"},
            "model_type: must be 'llama' .* got 'qwen2'",
        ),
        (
            {"num_attention_heads": 4, "tie_word_embeddings": True},
            {"num_attention_heads": 8},
            "num_attention_heads: must be 4",
        ),
        (
            {"tie_word_embeddings": True},
            {"tie_word_embeddings": False},
            "tie_word_embeddings: must be True .* False",
        ),
        (
            {"text_config": {"tie_word_embeddings": True}},
            {"tie_word_embeddings": False},
            "tie_word_embeddings: must",
        ),
        ({}, "{oops", "1/config.json: is not JSON"),
        ({}, "[]", "1/config.json: must be a JSON object"),
    ],
)
def test_configs_that_differ_are_named_with_both_values(tmp_path, first, second, message):
    with pytest.raises(InputError, match=message):
        check_configs(models(tmp_path, first, second))


def test_configs_that_agree_or_do_not_say_pass(tmp_path):
    same = {
        "vocab_size": 4,
        "head_dim": None,
        "quantization_config": {"quant_method": "fp8"},
        "rope_theta": 1e4,
    }
    check_configs(
        models(
            tmp_path,
            same,
            {"text_config": {"vocab_size": 4, "head_dim": 8}},
            None,
            {"rope_theta": 2e4},
        )
    )


def head(*names, values=(bytes(8), bytes(8))):
    header = {name: tensor([2], 8 * number, 8 * number + 8) for number, name in enumerate(names)}
    return pack(header, b"".join(values)[: 8 * len(names)])


@pytest.mark.parametrize(
    "config", [{"tie_word_embeddings": True}, {}, {"text_config": {"tie_word_embeddings": True}}]
)
def test_a_head_of_its_own_is_said_to_be_untied(tmp_path, config):
    names = ("model.embed_tokens.weight", "lm_head.weight")
    contents = [head(*names), head(*names, values=(bytes(8), bytes(7) + b"x"))]
    same, different = models(tmp_path, config, config, tensors=contents)
    assert (
        not untie_if_different(same.path, *find_head(same.tensors))
        and config_of(same.path) == config
    )
    assert untie_if_different(different.path, *find_head(different.tensors))
    changed = config_of(different.path)
    assert changed["tie_word_embeddings"] is False
    assert all(
        config_part["tie_word_embeddings"] is False
        for config_part in changed.values()
        if isinstance(config_part, dict)
    )


def test_a_model_is_tied_by_its_config_and_without_a_head(tmp_path):
    tied, both = [head("wte.weight"), head("wte.weight", "lm_head.weight")]
    true = {"tie_word_embeddings": True}
    false = {"tie_word_embeddings": False}
    read_models = models(
        tmp_path, true, true, false, {}, None, tensors=[tied, both, tied, tied, tied]
    )
    assert [is_tied(each) for each in read_models] == [True, False, False, False, False]
    assert find_head(read_models[0].tensors) is None
