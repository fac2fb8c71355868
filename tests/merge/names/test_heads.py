"""Tied and untied heads of several models: values and configs decide."""

import pytest
import torch
from safetensors import safe_open
from support.merge.names.models import (
    TEXT,
    load_whole,
    parameters,
    write_hub_form,
    write_tensors,
)
from transformers import LlamaConfig, LlamaForCausalLM

from merit_fast.errors import InputError
from merit_fast.merge import merge_models

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def llama(seed, tied):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=tied)).eval()


def write(path, model, **changes):
    return write_tensors(model, path, {**parameters(model), **changes})


def names_in(path):
    with safe_open(path / "model.safetensors", framework="pt") as opened:
        return set(opened.keys())


@pytest.mark.parametrize("order", [1, -1])
def test_a_head_that_repeats_the_tied_embedding_is_left_out(order, tmp_path):
    models = [llama(0, True), llama(1, True)]
    embedding = models[1].state_dict()[EMBEDDING]
    plain = write(tmp_path / "plain", models[0])
    repeated = write(tmp_path / "repeated", models[1], **{HEAD: embedding.clone()})
    summary = merge_models([plain, repeated][::order], out=tmp_path / "out")
    assert any("repeats the input embedding" in note for note in summary["notes"])
    assert HEAD not in names_in(tmp_path / "out")
    merged = load_whole(LlamaForCausalLM, tmp_path / "out")
    expected = sum(model.state_dict()[EMBEDDING].double() / 2 for model in models).float()
    assert torch.equal(merged[EMBEDDING], expected) and torch.equal(merged[HEAD], expected)


def test_a_tied_head_that_differs_by_one_bit_is_refused(tmp_path):
    models = [llama(0, True), llama(1, True)]
    other = models[1].state_dict()[EMBEDDING].clone()
    other.view(torch.int32)[-1, -1] ^= 1
    paths = [write(tmp_path / "a", models[0]), write(tmp_path / "b", models[1], **{HEAD: other})]
    with pytest.raises(InputError, match=f"{HEAD}: must repeat the input embedding.*it differs"):
        merge_models(paths, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_model_joins_an_untied_one_with_its_embedding_as_its_head(tmp_path):
    models = [llama(0, False), llama(1, True)]
    paths = [write_hub_form(model, tmp_path / f"m{k}") for k, model in enumerate(models)]
    merge_models(paths, [0.25, 0.75], out=tmp_path / "out")
    merged = load_whole(LlamaForCausalLM, tmp_path / "out")
    for name, tensor in merged.items():
        first, second = (model.state_dict()[name].double() for model in models)
        assert torch.equal(tensor, (0.25 * first + 0.75 * second).float()), name
    assert not torch.equal(merged[HEAD], merged[EMBEDDING])


def test_an_untied_head_does_not_join_a_tied_model(tmp_path):
    models = [llama(0, True), llama(1, False)]
    paths = [write_hub_form(model, tmp_path / f"m{k}") for k, model in enumerate(models)]
    with pytest.raises(InputError, match="a tied head cannot be merged with an untied one"):
        merge_models(paths, out=tmp_path / "out")
