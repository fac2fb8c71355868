"""Text fine-tunes merged into the multimodal model whose language model they are."""

import json

import pytest
import torch
import transformers
from support.merge.names.models import (
    CASES,
    TEXT,
    load_whole,
    make,
    parameters,
    write_hub_form,
    write_memory_form,
)

from merit_fast.errors import InputError
from merit_fast.merge import merge_models

TEXTS = {
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig"),
    "llava": ("LlamaForCausalLM", "LlamaConfig"),
    "qwen2_5_vl": ("Qwen2ForCausalLM", "Qwen2Config"),
}
FORMS = {"hub": write_hub_form, "memory": write_memory_form}
INSIDE = "model.language_model."


def text_model(case, whole, seed):
    """A fine-tune of the language model inside ``whole``, under the names of its own class."""
    model_class, config_class = TEXTS[case]
    tied = "lm_head.weight" not in parameters(whole)
    config = getattr(transformers, config_class)(**TEXT, tie_word_embeddings=tied)
    model = getattr(transformers, model_class)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    inner = whole.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = inner[name if name == "lm_head.weight" else INSIDE + name[len("model.") :]]
            parameter.copy_(start + 0.01 * torch.randn(start.shape, generator=generator))
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", TEXTS)
def test_a_text_fine_tune_moves_the_language_model_and_no_tower(case, form, tmp_path):
    whole = make(case, 0)
    base = FORMS[form](whole, tmp_path / "base")
    texts = [text_model(case, whole, seed) for seed in (1, 2)]
    paths = [write_hub_form(model, tmp_path / f"t{k}") for k, model in enumerate(texts)]
    options = {"method": "task_arithmetic", "missing": "base", "normalize": False}
    summary = merge_models(paths, [0.5, 0.25], base, out=tmp_path / "out", **options)
    merged = load_whole(type(whole), tmp_path / "out")
    states = [model.state_dict() for model in texts]
    for name, z in whole.state_dict().items():
        inner = "model." + name.removeprefix(INSIDE) if name.startswith(INSIDE) else name
        is_text = name.startswith(INSIDE) or name == "lm_head.weight"
        expected = z.double()
        for weight, state in zip((0.5, 0.25), states, strict=True):
            expected = expected + (weight * (state[inner].double() - z.double()) if is_text else 0)
        assert torch.allclose(merged[name].double(), expected, atol=1e-7, rtol=0), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [CASES[case][0]] and "vision_config" in config
    filled = [note for note in summary["notes"] if "come from the base" in note]
    assert len(filled) == 2 and all("vision" in note or "visual" in note for note in filled)


def test_without_missing_base_the_towers_are_an_error(tmp_path):
    whole = make("gemma3", 0)
    base = write_hub_form(whole, tmp_path / "base")
    text = write_hub_form(text_model("gemma3", whole, 1), tmp_path / "text")
    with pytest.raises(InputError, match="multi_modal_projector.* is not in|is missing"):
        merge_models([text], base=base, out=tmp_path / "out", method="task_arithmetic")


def test_another_language_model_is_no_sibling(tmp_path):
    whole = make("llava", 0)
    base = write_hub_form(whole, tmp_path / "base")
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT))
    other = write_hub_form(model, tmp_path / "other")
    with pytest.raises(InputError, match="model_type: must be"):
        merge_models([other], base=base, out=tmp_path / "out", method="linear", missing="base")
