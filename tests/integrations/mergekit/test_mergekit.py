"""mergekit's recipes with our engine, each common kind against its formula in fp64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.formulas.elements import nuslerp_by_hand
from support.merge.formulas import delta_method
from support.merge.gram_formulas import stock_by_hand
from support.merge.merges import load
from support.merge.recipes import along, assert_equal_to, merged, position, read

from merit_fast.errors import InputError
from merit_fast.merge.parameters import Layers, setting_at
from merit_fast.merge.table import METHODS


def test_linear_with_weights_along_the_layers(inside, tmp_path):
    recipe = """
        models:
          - {model: m1, parameters: {weight: [1, 0.5, 0.25]}}
          - {model: m2, parameters: {weight: "3e-1"}}
        merge_method: linear
        dtype: float32"""
    truths = {}
    for name, each in inside[1].items():
        w = along([1, 0.5, 0.25], position(name))
        truths[name] = (w * each.double() + 0.3 * inside[2][name].double()) / (w + 0.3)
    assert_equal_to(merged(recipe, tmp_path), truths)


def test_ties_with_densities_and_weights_per_model(inside, tmp_path):
    recipe = """
        models:
          - model: m0
          - {model: m1, parameters: {density: 0.5, weight: 0.5}}
          - {model: m2, parameters: {density: [1, 0.7, 0.1], weight: [0, 0.3, 0.7, 1]}}
          - model: m3
            parameters: {weight: [{filter: mlp, value: 0.5}, {filter: norm, value: 0.25}]}
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
            "dare_ties",
            name,
            [inside[1][name], inside[2][name]],
            base,
            [0.4, 0.3],
            density=[0.53, 0.6],
            normalize=False,
            seed=7,
        )
        for name, base in inside[0].items()
    }
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
    outputs = merged(recipe, tmp_path)
    for name, base in inside[0].items():
        truth = stock_by_hand(base, [tensors[name] for tensors in inside[1:]])
        assert outputs[name].dtype == torch.float16
        assert (
            np.abs(outputs[name].double().numpy() - truth).max() <= 2.0**-11 * np.abs(truth).max()
        )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


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
    outputs = merged("{models: [{model: m0+adapter}], merge_method: passthrough}", tmp_path)
    changed = [name for name, tensor in outputs.items() if not torch.equal(tensor, inside[0][name])]
    assert changed == ["model.layers.2.mlp.up_proj.weight"]


def test_config_and_tokenizer_are_the_base_models(inside, tmp_path):
    base = (
        "{models: [{model: m2, parameters: {weight: 1}}], base_model: m0, "
        "merge_method: task_arithmetic}"
    )
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
    takes_one = method in ("slerp", "passthrough", "nearswap", "arcee_fusion")
    models = [{"model": f"m{k}"} for k in ((1,) if takes_one else (1, 2))]
    based = method not in ("linear", "passthrough")
    recipe = {"models": models, "merge_method": method, "parameters": {"weight": 1, "t": 0.25}}
    config = read({**recipe, **({"base_model": "m0"} if based else {})}, tmp_path).config
    normalized = {"linear": True, "ties": True, "della": True, "multislerp": True}
    entry = METHODS[method]
    if entry.takes("weights"):
        assert config.normalize == normalized.get(method, False)
        assert [model.weight for model in config.models] == [1.0, 1.0]
    for name, default in (("density", 1.0), ("gamma", 0.01), ("epsilon", 0.15)):
        if entry.takes_by_model(name):
            assert [getattr(model, name) for model in config.models] == [default, default]
    assert config.epsilon == (1e-5 if method in ("ram", "ramplus_tl") else None)
    assert (config.scale, config.select_topk) == (1.0, 1.0)
    assert config.t == (0.25 if method in ("slerp", "nearswap") else None)
    assert config.vectors == "tensor" and config.rescale is None
    own = {"karcher": {"max_iter": 10, "tol": 1e-5}, "ramplus_tl": {"r": 0.1, "alpha": 0.2}}
    assert config.parameters == {**own, "multislerp": {"eps": 1e-8}}.get(method)


@pytest.mark.parametrize(
    "method, parameters, expected",
    [
        ("nuslerp", "nuslerp_flatten: false", {"vectors": "row"}),
        ("nuslerp", "nuslerp_flatten: false, nuslerp_row_wise: true", {"vectors": "column"}),
        ("nuslerp", "nuslerp_row_wise: true", {"vectors": "tensor"}),
        ("model_stock", "filter_wise: true", {"vectors": "row"}),
        ("ties", "rescale: true", {"rescale": True}),
        ("ties", "rescale: false", {"rescale": None}),
        ("della", "rescale: false", {"rescale": False}),
        ("ram", "epsilon: 0.5", {"epsilon": 0.5}),
        ("karcher", "max_iter: 5, tol: 1e-4", {"parameters": {"max_iter": 5, "tol": 1e-4}}),
        ("ramplus_tl", "r: 0.05, alpha: 1.0", {"parameters": {"r": 0.05, "alpha": 1.0}}),
        ("multislerp", "eps: 1e-6", {"parameters": {"eps": 1e-6}}),
    ],
)
def test_parameters_of_single_methods(inside, tmp_path, method, parameters, expected):
    recipe = (
        f"{{models: [{{model: m1}}, {{model: m2}}], base_model: m0, merge_method: {method}, "
        f"parameters: {{weight: 0.5, {parameters}}}}}"
    )
    config = read(recipe, tmp_path).config
    assert {name: getattr(config, name) for name in expected} == expected


def test_weights_of_nuslerp_may_cancel(inside, tmp_path):
    found = merged(
        """
        models:
          - {model: m1, parameters: {weight: -0.5}}
          - {model: m2, parameters: {weight: 0.5}}
        base_model: m0
        merge_method: nuslerp
        parameters: {nuslerp_flatten: false}
        """,
        tmp_path,
    )
    base, first, second = inside[:3]
    truths = {
        name: nuslerp_by_hand([first[name], second[name]], [0.5, 0.5], "row", base[name])
        for name in found
    }
    assert_equal_to(found, truths)


def test_float64(inside, tmp_path):
    recipe = "{models: [{model: m1}], merge_method: passthrough, dtype: float64}"
    found = merged(recipe, tmp_path)
    assert {tensor.dtype for tensor in found.values()} == {torch.float64}
    assert all(torch.equal(found[name], inside[1][name].double()) for name in found)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float64"


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
