"""Parameters per model and per tensor, and values that are not finite."""

import re

import numpy as np
import pytest
import torch
from support.formulas import delta_method, rounded
from support.merge.delta_cases import one
from support.merges import bits, load, merge, write

from merit_fast.errors import InputError
from merit_fast.merge import MergeConfig
from merit_fast.merge.parameters import Case, ModelSettings


# ---- parameters of one model, of one tensor
def test_every_model_has_its_own_parameters(tmp_path, backend):
    base = torch.zeros(6, 50)
    models = [torch.randn(6, 50) for _ in range(2)]
    for method, per_model in [
        ("ties", dict(density=(0.2, 0.9))),
        ("breadcrumbs", dict(density=(0.4, 0.8), gamma=(0.3, 0.0))),
        ("dare_linear", dict(density=(0.2, 1.0))),
        ("della", dict(density=(0.3, 0.7), epsilon=(0.2, 0.05))),
    ]:
        settings = tuple(
            ModelSettings(
                weight=(3.0, 1.0)[k], **{key: values[k] for key, values in per_model.items()}
            )
            for k in (0, 1)
        )
        result = one(tmp_path, models, base, [0.5, 0.5], method=method, models=settings)
        truth = delta_method(method, "w", models, base, [0.75, 0.25], **per_model)
        np.testing.assert_array_equal(bits(result), rounded(truth, torch.float32), err_msg=method)


def test_parameters_by_name_and_along_the_layers(tmp_path, backend):
    names = [
        *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("mlp", "attn")),
        "norm.weight",
    ]
    loaded = [{name: torch.randn(8, 30) for name in names} for _ in range(3)]
    paths = [write(tmp_path / f"m{k}", tensors) for k, tensors in enumerate(loaded)]
    density = (Case((0.2, 0.8), "mlp"), Case(0.5))
    config = MergeConfig(method="ties", density=density, scale=(1.0, 0.0, 0.5))
    merge(paths[:2], [0.5, 0.5], tmp_path / "out", config, paths[2])
    for name, tensor in load(tmp_path / "out").items():
        layer = int(name.split(".")[2]) if "layers" in name else 0
        inputs = [model[name] for model in loaded]
        share = (0.2, 0.5, 0.8)[layer] if "mlp" in name else 0.5
        scale = (1.0, 0.0, 0.5)[layer]
        truth = delta_method(
            "ties", name, inputs[:2], inputs[2], [0.5, 0.5], density=share, scale=scale
        )
        np.testing.assert_array_equal(bits(tensor), rounded(truth, torch.float32), err_msg=name)


def test_a_tensor_without_a_case_is_named(tmp_path):
    models = [torch.randn(4)]
    base = torch.randn(4)
    with pytest.raises(InputError, match="merge: w: density has no case that matches this tensor"):
        one(tmp_path, models, base, method="ties", density=(Case(0.5, "mlp"),))
    per_model = (ModelSettings(weight=(Case(1.0, "mlp"),), density=0.5),)
    with pytest.raises(
        InputError,
        match=re.escape("merge: w: models[0].weight has no case that matches this tensor"),
    ):
        one(tmp_path, models, base, method="ties", models=per_model)
    half = (ModelSettings(weight=1.0), ModelSettings())
    with pytest.raises(InputError, match=re.escape("models[1].weight has no case")):
        one(tmp_path, models * 2, base, method="ties", density=0.5, models=half)
    zero = (ModelSettings(weight=1.0), ModelSettings(weight=-1.0))
    with pytest.raises(
        InputError,
        match=re.escape("merge: w: weights must have a sum other than 0, got [1.0, -1.0]"),
    ):
        one(tmp_path, models * 2, base, method="ties", density=0.5, models=zero)


def test_della_refuses_probabilities_outside_0_and_1(tmp_path):
    models = [torch.randn(4)]
    base = torch.randn(4)
    for density, epsilon in ((0.2, 0.2), (0.9, 0.1), (0.5, 0.6)):
        with pytest.raises(
            InputError, match="merge: w: density .* epsilon must lie between 0 and 1"
        ):
            one(tmp_path, models, base, method="della", density=density, epsilon=epsilon)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "dare_linear", "della", "sce"])
def test_nonfinite_inputs_and_results_are_named(tmp_path, method, backend, limited):
    options = {"select_topk": 0.5} if method == "sce" else {"density": 0.5}
    for k, bad in ((0, float("nan")), (1, float("inf")), (2, float("-inf"))):
        inputs = [torch.randn(10, 10) for _ in range(3)]
        inputs[k][3, 3] = bad
        where = "base" if k == 2 else f"m{k}"
        with pytest.raises(
            InputError, match=f"{where}/model.safetensors: w: must be finite, holds NaN or infinity"
        ):
            one(tmp_path, inputs[:2], inputs[2], method=method, **options)
    far = [torch.full((10, 10), 6e4).half(), torch.full((10, 10), -6e4).half()]
    with pytest.raises(InputError, match="w: the result overflows F16"):
        one(
            tmp_path,
            far[:1],
            far[1],
            method=method,
            scale=3.0,
            **({"density": 1.0} if method != "sce" else {}),
        )
