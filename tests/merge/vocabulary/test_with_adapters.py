"""Adapters whose embeddings were resized, and adapters next to models with other tokens: PEFT's
own files and its own merge.
"""

import copy

import pytest
import torch
from support.merge.merges import load
from support.merge.vocabulary.models import EMBEDDING, HEAD, OWN, make_tokenizer
from support.tiny import make_model

from merit_fast.merge import merge_models

SIZES = dict(hidden_size=24, intermediate_size=32, num_attention_heads=3, num_key_value_heads=1)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    options = {"vocab_size": len(OWN), "tie_word_embeddings": False, "pad_token_id": None}
    model = make_model(tmp_path / "base", **SIZES, **options)
    make_tokenizer(tmp_path / "base")
    return model


def save_adapter(model, folder, **options):
    """Writes a random adapter as PEFT does; returns the state of PEFT's own merge."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, init_lora_weights=False, **options)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(folder, save_embedding_layers="modules_to_save" not in options)
    return wrapped.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"]},
    ],
    ids=["saved", "targeted", "written"],
)
def test_an_adapter_with_more_rows_than_its_base(base, tmp_path, options):
    model = copy.deepcopy(base)
    model.resize_token_embeddings(len(OWN) + 2, mean_resizing=False)
    truth = save_adapter(model, tmp_path / "adapter", **options)
    make_tokenizer(tmp_path / "adapter", ("<x>", "<y>"))
    merge_models([tmp_path / "adapter"], base=tmp_path / "base", out=tmp_path / "out")
    out = load(tmp_path / "out")
    for name in (EMBEDDING, HEAD, "model.layers.0.self_attn.q_proj.weight"):
        assert torch.allclose(out[name], truth[name], atol=1e-6), name


def test_an_adapter_of_the_embedding_next_to_a_model_with_more_tokens(base, tmp_path):
    truth = save_adapter(copy.deepcopy(base), tmp_path / "adapter", target_modules=["embed_tokens"])
    options = {"vocab_size": len(OWN) + 1, "tie_word_embeddings": False, "pad_token_id": None}
    other = make_model(tmp_path / "other", seed=3, **SIZES, **options).state_dict()
    make_tokenizer(tmp_path / "other", ("<x>",), own=OWN[::-1])
    models = [tmp_path / "other", tmp_path / "adapter"]
    merge_models(models, base=tmp_path / "base", out=tmp_path / "out", tokenizer="union")
    out = load(tmp_path / "out")[EMBEDDING]
    order = torch.arange(len(OWN) - 1, -1, -1)
    mean = (truth[EMBEDDING] + other[EMBEDDING][order]) / 2
    assert torch.allclose(out[: len(OWN)], mean, atol=1e-6)
    assert torch.equal(out[len(OWN)], other[EMBEDDING][len(OWN)])
