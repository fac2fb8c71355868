"""mergekit's recipes that stack slices of layers."""

import json

import pytest
import torch
from support.formulas import delta_method
from support.gram_formulas import slerp_by_hand
from support.merge.recipes import SMALL, along, assert_equal_to, layer_of, merged, position
from support.merges import load, write
from support.tiny import make_model

from merit_fast.errors import InputError
from merit_fast.merge.read.slices import stands_before


def test_slerp_of_one_slice_by_kind_of_tensor_starts_at_the_base(inside, tmp_path):
    recipe = """
        slices:
          - sources:
              - {model: m0, layer_range: [0, 4]}
              - {model: m1, layer_range: [0, 4]}
        merge_method: slerp
        base_model: m1
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - value: 0.5
        dtype: float32"""
    truths = {}
    for name, start in inside[1].items():
        values = (
            [0, 0.5, 0.3, 0.7, 1]
            if "self_attn" in name
            else [1, 0.5, 0.7, 0.3, 0]
            if "mlp" in name
            else [0.5]
        )
        truths[name] = slerp_by_hand(along(values, position(name)), start, inside[0][name])
    assert_equal_to(merged(recipe, tmp_path), truths)


def test_overlapping_layers_are_stacked_and_transformers_loads_them(inside, tmp_path):
    recipe = """
        slices:
          - sources: [{model: m0, layer_range: [0, 3]}]
          - sources:
              - model: m1
                layer_range: [1, 4]
                parameters: {scale: [{filter: layers.2.mlp.down_proj, value: 0.5}, {value: 1.0}]}
        merge_method: passthrough"""
    outputs = merged(recipe, tmp_path)
    assert torch.equal(outputs["model.embed_tokens.weight"], inside[0]["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(outputs[name], inside[1][name])
    for name, tensor in outputs.items():
        if (layer := layer_of(name)) is not None:
            source, theirs = (0, layer) if layer < 3 else (1, layer - 2)
            source_name = name.replace(f"layers.{layer}.", f"layers.{theirs}.")
            scale = 0.5 if source == 1 and source_name.endswith("2.mlp.down_proj.weight") else 1.0
            assert torch.equal(tensor, scale * inside[source][source_name]), name
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert (
        model.config.num_hidden_layers == 6
        and not loading["missing_keys"]
        and not loading["unexpected_keys"]
    )
    assert torch.equal(
        model.state_dict()["model.layers.5.mlp.up_proj.weight"],
        outputs["model.layers.5.mlp.up_proj.weight"],
    )
    assert (
        json.loads((tmp_path / "out" / "stage.json").read_text())["inputs"]["slices"]
        == "m0[0:3]; m1[1:4]"
    )


def test_lists_with_an_entry_per_layer_follow_the_layers(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    monkeypatch.chdir(tmp_path)
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    sizes = {
        **SMALL,
        "num_hidden_layers": 3,
        "layer_types": kinds,
        "use_sliding_window": True,
        "eos_token_id": [1, 2, 3],
    }
    Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained("q")
    recipe = {
        "slices": [{"sources": [{"model": "q", "layer_range": span}]} for span in ([0, 2], [0, 3])],
        "merge_method": "passthrough",
    }
    merged(recipe, tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.num_hidden_layers == 5 and config.layer_types == [*kinds[:2], *kinds]
    assert config.eos_token_id == [1, 2, 3]  # three of them, as there were layers, but not of them


def test_slices_with_a_base_and_parameters_of_their_own(inside, tmp_path):
    recipe = """
        slices:
          - sources:
              - {model: m0, layer_range: [0, 2]}
              - {model: m1, layer_range: [1, 3], parameters: {weight: 0.4}}
              - {model: m2, layer_range: [0, 2]}
            parameters: {density: [0.2, 0.9], lambda: 0.5}
          - sources:
              - {model: m0, layer_range: [3, 4]}
              - {model: m1, layer_range: [3, 4]}
              - model: m2
                layer_range: [3, 4]
                parameters: {weight: [{filter: layers.3., value: 2.0}]}
        merge_method: ties
        base_model: m0
        parameters: {weight: [0.6, 0.8], density: 0.5}
        dtype: float32"""
    truths = {}
    for name in inside[0]:
        layer = layer_of(name)
        if layer == 3:
            continue
        second = layer == 2 or name in ("model.norm.weight", "lm_head.weight")
        t = position(name, *((2, 1) if second else (0, 2)))
        theirs = [layer, layer + 1, layer] if layer in (0, 1) else [3, 3, 3]
        names = [
            name if layer is None else name.replace(f"layers.{layer}.", f"layers.{n}.")
            for n in theirs
        ]
        base, *models = [
            tensors[source_name] for tensors, source_name in zip(inside, names, strict=False)
        ]
        top = along([0.6, 0.8], t)
        weights = [top if second else 0.4, 2.0 if layer == 2 else top]
        density, scale = (0.5, 1.0) if second else (along([0.2, 0.9], t), 0.5)
        truths[name] = delta_method(
            "ties", name, models, base, weights, density=density, scale=scale
        )
    assert_equal_to(merged(recipe, tmp_path), truths)


def test_linear_slices_may_have_different_numbers_of_models(inside, tmp_path):
    recipe = """
        slices:
          - sources:
              - {model: m1, layer_range: [0, 1]}
              - {model: m2, layer_range: [0, 1], parameters: {weight: 0.25}}
          - sources: [{model: m2, layer_range: [1, 4]}]
        merge_method: linear
        parameters: {weight: 1.0}"""
    truths = {}
    for name, two in inside[2].items():
        first = layer_of(name) == 0 or name == "model.embed_tokens.weight"
        truths[name] = (
            (inside[1][name].double() + 0.25 * two.double()) / 1.25 if first else two.double()
        )
    assert_equal_to(merged(recipe, tmp_path), truths)


def test_models_of_other_depths_can_be_stacked(inside, tmp_path, folder, monkeypatch):
    make_model(tmp_path / "deep", seed=5, **{**SMALL, "num_hidden_layers": 6})
    deep = str(tmp_path / "deep")
    recipe = {
        "slices": [
            {"sources": [{"model": m, "layer_range": r}]}
            for m, r in (("m0", [0, 2]), (deep, [5, 6]))
        ],
        "merge_method": "passthrough",
    }
    outputs = merged(recipe, tmp_path)
    assert torch.equal(
        outputs["model.layers.2.mlp.up_proj.weight"],
        load(tmp_path / "deep")["model.layers.5.mlp.up_proj.weight"],
    )
    recipe["slices"][0]["sources"][0]["layer_range"] = [3, 5]
    with pytest.raises(
        InputError,
        match=r"^m0: slices\[0\]: layer_range must end at 4, the number of layers, .* got 5$",
    ):
        merged(recipe, tmp_path)


def test_an_adapters_layers_can_be_stacked(inside, tmp_path):
    sources = (
        [{"model": "m1", "layer_range": [0, 1]}],
        [{"model": "m0+adapter", "layer_range": [2, 4]}],
    )
    outputs = merged(
        {"slices": [{"sources": each} for each in sources], "merge_method": "passthrough"}, tmp_path
    )
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(outputs[name.format(2)], inside[0][name.format(3)])
    assert not torch.equal(outputs[name.format(1)], inside[0][name.format(2)])


def test_stacked_output_is_cut_by_size(inside, tmp_path):
    recipe = """
        slices:
          - sources: [{model: m0, layer_range: [0, 2]}]
          - sources: [{model: m1, layer_range: [2, 4]}]
        merge_method: passthrough"""
    outputs = merged(recipe, tmp_path, "shard_size=20K")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 1
    assert (
        set(outputs) == set(inside[0])
        and (tmp_path / "out" / "model.safetensors.index.json").exists()
    )


def test_layers_of_two_kinds_are_not_stacked(inside, tmp_path):
    write(tmp_path / "v", {"vision.layers.0.w": torch.ones(2), "text.layers.0.w": torch.ones(2)})
    sources = [{"model": str(tmp_path / "v"), "layer_range": [0, 1]}]
    with pytest.raises(
        InputError, match=r"v: slices need layers of one kind, got text.layers, vision.layers$"
    ):
        merged({"slices": [{"sources": sources}], "merge_method": "passthrough"}, tmp_path)


@pytest.mark.parametrize(
    "name,before",
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("gpt_neox.embed_in.weight", True),
        ("transformer.word_embeddings_layernorm.weight", True),
        ("model.norm.weight", False),
        ("transformer.ln_f.bias", False),
        ("embed_out.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_which_tensors_stand_before_the_layers(name, before):
    assert stands_before(name) == before
