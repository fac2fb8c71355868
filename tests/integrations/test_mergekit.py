"""mergekit's recipes with our engine: each common kind against its formula in fp64, and each refusal by its line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.formulas import delta_method
from support.gram_formulas import slerp_by_hand, stock_by_hand
from support.merges import load, write
from support.tiny import make_model

from merit_fast.errors import InputError
from merit_fast.integrations.mergekit.recipe import merge_recipe, read_mergekit
from merit_fast.merge.parameters import Layers, setting_at
from merit_fast.merge.read.slices import stands_before
from merit_fast.merge.table import METHODS
from merit_fast.progress import SilentProgress

SMALL = dict(
    vocab_size=48, hidden_size=24, intermediate_size=36, num_attention_heads=3, num_key_value_heads=1,
    num_hidden_layers=4, tie_word_embeddings=False, bos_token_id=None,
)  # fmt: skip
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four models m0 .. m3 of 4 layers, an adapter on m0, and equal tokenizers beside m0 and m1."""
    root = tmp_path_factory.mktemp("mergekit")
    for k in range(4):
        model = make_model(root / f"m{k}", shard="9KB", seed=k, **SMALL)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(root / f"m{k}", max_shard_size="9KB")
        vocabulary = {
            "model": {"vocab": {"a": 0, "b": 1 + (k > 1)}},
            "added_tokens": [{"id": 7, "content": "<s>"}],
        }
        (root / f"m{k}" / "tokenizer.json").write_text(json.dumps(vocabulary))
    key = "base_model.model.model.layers.2.mlp.up_proj"
    pair = {f"{key}.lora_A.weight": torch.randn(2, 24), f"{key}.lora_B.weight": torch.randn(36, 2)}
    write(root / "adapter", pair, "adapter_model.safetensors")
    (root / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    )
    return root


@pytest.fixture
def inside(folder, monkeypatch):
    """Paths in a recipe count from the current directory."""
    monkeypatch.chdir(folder)
    return [load(folder / f"m{k}") for k in range(4)]


def read(text, tmp_path, *assignments):
    file = tmp_path / "r.yml"
    file.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return read_mergekit(file, assignments)


def merged(text, tmp_path, *assignments):
    merge_recipe(read(text, tmp_path, *assignments), tmp_path / "out", SilentProgress())
    return load(tmp_path / "out")


def layer_of(name):
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def position(name, first=0, depth=LAYERS):
    layer = layer_of(name)
    return 0.0 if layer is None else (layer - first) / (depth - 1) if depth > 1 else 1.0


def along(values, t):
    return float(np.interp(t * (len(values) - 1), range(len(values)), values))


def assert_equal_to(found, truths):
    """Within 2 units in the last place of fp32: sums of few terms may round once more in the formula."""
    assert set(found) == set(truths)
    for name, truth in truths.items():
        exact = np.asarray(truth).ravel()
        error = np.abs(found[name].double().numpy().ravel() - exact)
        assert (error <= 2.0**-22 * np.abs(exact) + 1e-9).all(), name


def test_linear_with_weights_along_the_layers(inside, tmp_path):
    recipe = """
        models:
          - {model: m1, parameters: {weight: [1, 0.5, 0.25]}}
          - {model: m2, parameters: {weight: "3e-1"}}
        merge_method: linear
        dtype: float32"""
    truths = {}
    for name, one in inside[1].items():
        w = along([1, 0.5, 0.25], position(name))
        truths[name] = (w * one.double() + 0.3 * inside[2][name].double()) / (w + 0.3)
    assert_equal_to(merged(recipe, tmp_path), truths)


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
    found = merged(recipe, tmp_path)
    assert torch.equal(found["model.embed_tokens.weight"], inside[0]["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(found[name], inside[1][name])
    for name, tensor in found.items():
        if (layer := layer_of(name)) is not None:
            source, theirs = (0, layer) if layer < 3 else (1, layer - 2)
            own = name.replace(f"layers.{layer}.", f"layers.{theirs}.")
            scale = 0.5 if source == 1 and own.endswith("2.mlp.down_proj.weight") else 1.0
            assert torch.equal(tensor, scale * inside[source][own]), name
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
        found["model.layers.5.mlp.up_proj.weight"],
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


def test_ties_with_densities_and_weights_per_model(inside, tmp_path):
    recipe = """
        models:
          - model: m0
          - {model: m1, parameters: {density: 0.5, weight: 0.5}}
          - {model: m2, parameters: {density: [1, 0.7, 0.1], weight: [0, 0.3, 0.7, 1]}}
          - {model: m3, parameters: {weight: [{filter: mlp, value: 0.5}, {filter: norm, value: 0.25}]}}
        merge_method: ties
        base_model: m0
        parameters: {normalize: true, int8_mask: true, weight: 0.1, lambda: 0.5}
        dtype: float32"""
    truths = {}
    for name, base in inside[0].items():
        t = position(name)
        weights = [
            0.5,
            along([0, 0.3, 0.7, 1], t),
            0.5 if "mlp" in name else 0.25 if "norm" in name else 0.1,
        ]
        density = [0.5, along([1, 0.7, 0.1], t), 1.0]
        models = [tensors[name] for tensors in inside[1:]]
        truths[name] = delta_method("ties", name, models, base, weights, density=density, scale=0.5)
    assert_equal_to(merged(recipe, tmp_path), truths)


def test_dare_ties_does_not_normalise_unless_told(inside, tmp_path):
    recipe = """
        models:
          - {model: m1, parameters: {density: 0.53, weight: 0.4}}
          - {model: m2, parameters: {density: 0.6, weight: 0.3}}
        merge_method: dare_ties
        base_model: m0
        dtype: float32"""
    truths = {
        name: delta_method(
            "dare_ties", name, [inside[1][name], inside[2][name]], base, [0.4, 0.3], density=[0.53, 0.6],
            normalize=False, seed=7,
        )
        for name, base in inside[0].items()
    }  # fmt: skip
    assert_equal_to(merged(recipe, tmp_path, "seed=7"), truths)


def test_model_stock_in_a_module_and_another_dtype(inside, tmp_path):
    recipe = """
        modules:
          default:
            models: [{model: m1}, {model: m2}, {model: m3}]
        base_model: m0
        merge_method: model_stock
        dtype: float32
        out_dtype: float16"""
    found = merged(recipe, tmp_path)
    for name, base in inside[0].items():
        truth = stock_by_hand(base, [tensors[name] for tensors in inside[1:]])
        assert found[name].dtype == torch.float16
        assert np.abs(found[name].double().numpy() - truth).max() <= 2.0**-11 * np.abs(truth).max()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


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
              - {model: m2, layer_range: [3, 4], parameters: {weight: [{filter: layers.3., value: 2.0}]}}
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
        base, *models = [tensors[own] for tensors, own in zip(inside, names, strict=False)]
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
    found = merged(recipe, tmp_path)
    assert torch.equal(
        found["model.layers.2.mlp.up_proj.weight"],
        load(tmp_path / "deep")["model.layers.5.mlp.up_proj.weight"],
    )
    recipe["slices"][0]["sources"][0]["layer_range"] = [3, 5]
    with pytest.raises(
        InputError,
        match=r"^m0: slices\[0\]: layer_range must end at 4, the number of layers, .* got 5$",
    ):
        merged(recipe, tmp_path)


@pytest.mark.parametrize("reference", ["m0+adapter", {"model": {"path": "m0"}, "lora": "adapter"}])
def test_an_adapter_on_the_base_is_a_model(inside, tmp_path, reference):
    recipe = {
        "models": [
            {"model": reference, "parameters": {"weight": 0.5}},
            {"model": "m1", "parameters": {"weight": 0.25}},
        ],
        "merge_method": "task_arithmetic",
        "base_model": "m0",
        "parameters": {"lambda": 1.5},
    }
    pair = load(Path("adapter"))
    change = (
        2.0
        * pair[next(n for n in pair if "lora_B" in n)].double()
        @ pair[next(n for n in pair if "lora_A" in n)].double()
    )
    truths = {}
    for name, base in inside[0].items():
        truths[name] = base.double() + 1.5 * 0.25 * (inside[1][name].double() - base.double())
        if name == "model.layers.2.mlp.up_proj.weight":
            truths[name] = truths[name] + 1.5 * 0.5 * change
    assert_equal_to(merged(recipe, tmp_path), truths)


def test_an_adapter_alone_becomes_a_whole_model(inside, tmp_path):
    found = merged("{models: [{model: m0+adapter}], merge_method: passthrough}", tmp_path)
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, inside[0][name])]
    assert changed == ["model.layers.2.mlp.up_proj.weight"]


def test_an_adapters_layers_can_be_stacked(inside, tmp_path):
    sources = (
        [{"model": "m1", "layer_range": [0, 1]}],
        [{"model": "m0+adapter", "layer_range": [2, 4]}],
    )
    found = merged(
        {"slices": [{"sources": one} for one in sources], "merge_method": "passthrough"}, tmp_path
    )
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(found[name.format(2)], inside[0][name.format(3)])
    assert not torch.equal(found[name.format(1)], inside[0][name.format(2)])


def test_config_and_tokenizer_are_the_base_models(inside, tmp_path):
    base = "{models: [{model: m2, parameters: {weight: 1}}], base_model: m0, merge_method: task_arithmetic}"
    merged(base, tmp_path)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == Path(
        "m0/tokenizer.json"
    ).read_bytes()


def test_linear_takes_the_base_as_one_more_model(inside, tmp_path):
    recipe = read(
        "{models: [{model: m1}], base_model: m0, merge_method: linear, parameters: {weight: 0.5}}",
        tmp_path,
    )
    assert [str(path) for path in recipe.models] == ["m1", "m0"] and recipe.base is None
    assert [model.weight for model in recipe.config.models] == [0.5, 0.5]


@pytest.mark.parametrize("method", list(METHODS))
def test_mergekits_defaults_hold(inside, tmp_path, method):
    models = [{"model": f"m{k}"} for k in ((1,) if method in ("slerp", "passthrough") else (1, 2))]
    based = method not in ("linear", "passthrough")
    recipe = {"models": models, "merge_method": method, "parameters": {"weight": 1, "t": 0.25}}
    config = read({**recipe, **({"base_model": "m0"} if based else {})}, tmp_path).config
    normalized = {"linear": True, "ties": True, "della": True, "multislerp": True}
    if METHODS[method].takes("weights"):
        assert config.normalize == normalized.get(method, False)
        assert [model.weight for model in config.models] == [1.0, 1.0]
    if METHODS[method].takes("density"):
        assert [model.density for model in config.models] == [1.0, 1.0]
    if METHODS[method].takes("gamma"):
        assert [model.gamma for model in config.models] == [0.01, 0.01]
    if METHODS[method].takes("epsilon"):
        assert [model.epsilon for model in config.models] == [0.15, 0.15]
    assert (config.scale, config.select_topk) == (1.0, 1.0)
    assert config.t == (0.25 if method == "slerp" else 0.5)


def test_scopes_are_asked_from_the_innermost_out(inside, tmp_path):
    recipe = """
        modules:
          default:
            models:
              - {model: m1, parameters: {weight: [{filter: a., value: 1}]}}
              - {model: m2, parameters: {weight: {filter: a., value: "*2"}}}
            parameters: {weight: [{filter: b., value: 2}]}
        parameters: {weight: [{filter: "*", value: 3}, {filter: c., value: 4}]}
        merge_method: linear"""
    weight = read(recipe.replace('"*2"', "true"), tmp_path).config.models
    layers = Layers([])
    for model in weight:
        assert [setting_at(model.weight, name, layers) for name in ("a.b.", "b.c.", "c.")] == [
            1.0,
            2.0,
            3.0,
        ]
    with pytest.raises(
        InputError,
        match=r"r.yml: modules.default.models\[1\].parameters.weight: must be a finite number",
    ):
        read(recipe, tmp_path)


def test_stacked_output_is_cut_by_size(inside, tmp_path):
    recipe = """
        slices:
          - sources: [{model: m0, layer_range: [0, 2]}]
          - sources: [{model: m1, layer_range: [2, 4]}]
        merge_method: passthrough"""
    found = merged(recipe, tmp_path, "shard_size=20K")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 1
    assert (
        set(found) == set(inside[0])
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
