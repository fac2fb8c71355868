"""Models whose files name or cut their tensors differently merge as transformers loads them."""

import pytest
import torch
from safetensors import safe_open
from support.merge.names.models import (
    CASES,
    assert_average,
    load_whole,
    make,
    write_hub_form,
    write_memory_form,
)

from merit_fast.merge import merge_models

FORMS = {"hub": write_hub_form, "memory": write_memory_form}


def names_in(path):
    with safe_open(path / "model.safetensors", framework="pt") as opened:
        return set(opened.keys())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("forms", [("hub", "memory"), ("memory", "hub")], ids="-".join)
def test_two_forms_of_a_model_average_and_keep_the_first_ones_names(case, forms, tmp_path):
    models = [make(case, seed) for seed in (0, 1)]
    paths = [
        FORMS[form](model, tmp_path / f"m{k}")
        for k, (form, model) in enumerate(zip(forms, models, strict=True))
    ]
    assert (names_in(paths[0]) == names_in(paths[1])) == (case == "gpt_oss")
    merge_models(paths, [0.3, 0.7], out=tmp_path / "out")
    merged = load_whole(type(models[0]), tmp_path / "out")
    assert_average(merged, models, [0.3, 0.7])
    assert names_in(tmp_path / "out") == names_in(paths[0])


@pytest.mark.parametrize("case", ["gemma3", "qwen3_moe", "mixtral"])
def test_the_output_has_the_names_of_the_base(case, tmp_path):
    models = [make(case, seed) for seed in (0, 1, 2)]
    base = write_hub_form(models[0], tmp_path / "base")
    paths = [write_memory_form(model, tmp_path / f"m{k}") for k, model in enumerate(models[1:])]
    options = {"method": "task_arithmetic", "normalize": False, "scale": 0.5}
    merge_models(paths, [1.0, 1.0], base, out=tmp_path / "out", **options)
    merged = load_whole(type(models[0]), tmp_path / "out")
    start, one, two = (model.state_dict() for model in models)
    for name, tensor in merged.items():
        z = start[name].double()
        expected = z + 0.5 * (one[name].double() - z) + 0.5 * (two[name].double() - z)
        assert torch.allclose(tensor.double(), expected, atol=1e-7, rtol=0), name
    assert names_in(tmp_path / "out") == names_in(base)
