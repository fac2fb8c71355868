"""Adapters on models whose files have other names than PEFT's modules, against PEFT's own merge."""

import copy

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from support.merge.names.models import load_whole, make, write_hub_form, write_memory_form

from merit_fast.errors import InputError
from merit_fast.merge import merge_models

FORMS = {"hub": write_hub_form, "memory": write_memory_form}
LINEAR = {"target_modules": "all-linear"}
EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
CASES = {
    "gemma3": LINEAR,
    "llava": LINEAR,
    "qwen2_5_vl": LINEAR,
    "vit": {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]},
    "qwen3_moe": EXPERTS,
    "mixtral": EXPERTS,
}


def header_of(path):
    """Name -> (dtype, shape) of every tensor in the file."""
    with safe_open(path / "model.safetensors", framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}


def write_adapter(model, path, seed, **options):
    """An adapter of random factors; returns the parameters that PEFT merges it into."""
    config = peft.LoraConfig(r=2, lora_alpha=3, **options)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(path)
    return wrapped.merge_and_unload().state_dict()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_changes_what_peft_changes(case, form, tmp_path):
    model = make(case, 0)
    base = FORMS[form](model, tmp_path / "base")
    expected = write_adapter(model, tmp_path / "adapter", 1, **CASES[case])
    merge_models([tmp_path / "adapter"], base=base, out=tmp_path / "out")
    merged = load_whole(type(model), tmp_path / "out")
    assert header_of(tmp_path / "out") == header_of(base)
    assert merged.keys() == expected.keys()
    start = model.state_dict()
    assert any(not torch.equal(merged[name], start[name]) for name in merged)
    for name, tensor in merged.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6, rtol=1e-6), name


@pytest.mark.parametrize("form", FORMS)
def test_a_text_adapter_changes_the_language_model_of_its_multimodal_sibling(form, tmp_path):
    whole = make("gemma3", 0)
    base = FORMS[form](whole, tmp_path / "base")
    text = transformers.Gemma3ForCausalLM(whole.config.text_config).eval()
    inside = "model.language_model."
    state = {
        "model." + name.removeprefix(inside): tensor
        for name, tensor in whole.state_dict().items()
        if name.startswith(inside)
    }
    text.load_state_dict(state | {"lm_head.weight": whole.state_dict()["lm_head.weight"]})
    expected = write_adapter(text, tmp_path / "adapter", 1, **LINEAR)
    merge_models([tmp_path / "adapter"], base=base, out=tmp_path / "out")
    merged = load_whole(type(whole), tmp_path / "out")
    for name, tensor in merged.items():
        inner = "model." + name.removeprefix(inside)
        wanted = expected[inner] if name.startswith(inside) else whole.state_dict()[name]
        assert torch.allclose(tensor, wanted, atol=1e-6, rtol=1e-6), name


def test_an_adapter_of_another_model_is_refused_by_the_name_it_misses(tmp_path):
    model = make("vit", 0)
    write_adapter(model, tmp_path / "adapter", 1, target_modules=["fc1"])
    base = write_hub_form(make("gemma3", 0), tmp_path / "base")
    with pytest.raises(InputError, match="lora_A.weight.*fc1"):
        merge_models([tmp_path / "adapter"], base=base, out=tmp_path / "out")
