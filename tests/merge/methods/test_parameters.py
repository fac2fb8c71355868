"""Parameters that differ by model, by a tensor's name and along the layers; refusals."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.merges import load, merge, write

from merit_fast.errors import InputError
from merit_fast.merge import MergeConfig
from merit_fast.merge.parameters import Case, Layers, ModelSettings, setting_at
from merit_fast.merge.table import METHODS
from merit_fast.options.parser import parse, to_plain

NAMES = [
    "embed.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("attn", "mlp")),
    "lm_head",
]


def at(setting, name, names=NAMES):
    return setting_at(setting, name, Layers(names))


def test_a_number_holds_everywhere():
    assert {at(0.3, name) for name in NAMES} == {0.3}


def test_a_gradient_is_linear_between_its_points():
    along = [at((0.0, 1.0, 3.0), f"model.layers.{i}.mlp.weight") for i in range(5)]
    assert along == [0.0, 0.5, 1.0, 2.0, 3.0]
    assert (
        at((0.0, 1.0, 3.0), "embed.weight") == at((0.0, 1.0, 3.0), "lm_head") == 0.0
    )  # of no layer: the first point
    assert at((0.7,), "model.layers.3.mlp.weight") == 0.7


def test_of_one_layer_the_last_point_holds():
    assert at((0.2, 0.9), "h.0.w", ["h.0.w", "norm"]) == 0.9  # as in mergekit


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=7), st.integers(1, 40))
def test_a_gradient_is_numpys_interpolation(points, count):
    names = [f"h.{i}.w" for i in range(count)]
    for i, name in enumerate(names):
        position_of_layer = i / (count - 1) if count > 1 else 1.0
        expected = (
            np.interp(position_of_layer, np.linspace(0, 1, len(points)), points)
            if len(points) > 1
            else points[0]
        )
        assert at(tuple(points), name, names) == pytest.approx(expected, abs=1e-12)


def test_the_first_case_that_matches_counts():
    cases = (Case(0.1, "mlp"), Case((0.0, 1.0), "layers"), Case(0.5))
    assert at(cases, "model.layers.4.mlp.weight") == 0.1
    assert at(cases, "model.layers.4.attn.weight") == 1.0
    assert at(cases, "lm_head") == 0.5
    assert at((Case(0.1, "mlp"),), "lm_head") is None
    assert at((Case(0.1, "*"), Case(0.2, "mlp")), "x.mlp") == 0.1
    assert at((Case(0.1, "m.p"),), "x.mlp") is None  # a part of the name, no pattern


def test_which_layer_a_name_belongs_to():
    layers = Layers(
        ["model.layers.0.experts.7.w", "model.layers.2.experts.0.w", "v1.5x", "block.w.10"]
    )
    assert layers.count == 3 and layers.position("model.layers.1.experts.7.w") == 0.5
    assert (
        layers.position("v1.5x") == layers.position("block.w.10") == 0.0
    )  # no number between dots


def run(tmp_path, inputs, base=None, weights=None, **options):
    """Merges models of these tensors; the out of the n-th call is its own."""
    number = len(list(tmp_path.glob("run*")))
    root = tmp_path / f"run{number}"
    paths = [write(root / f"m{k}", model_tensors) for k, model_tensors in enumerate(inputs)]
    start = write(root / "base", base) if base else None
    merge(
        paths,
        weights or [1 / len(inputs)] * len(inputs),
        root / "out",
        MergeConfig(**options),
        start,
    )
    return load(root / "out")


def inputs(count=2):
    return [{name: torch.randn(4, 5).double() for name in NAMES} for _ in range(count)]


def position(name):
    return int(name.split(".")[2]) / 4 if "layers" in name else 0.0


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "multislerp"])
def test_weights_of_each_model_by_name_and_layer(tmp_path, method):
    models = inputs()
    base = inputs(1)[0]
    settings = (
        ModelSettings(weight=(1.0, 3.0)),
        ModelSettings(weight=(Case((2.0, 0.0), "attn"), Case(1.0))),
    )
    merged = run(
        tmp_path,
        models,
        base if method == "task_arithmetic" else None,
        method=method,
        models=settings,
    )
    for name, tensor in merged.items():
        t = position(name)
        raw = (1 + 2 * t, 2 - 2 * t if "attn" in name else 1.0)
        w = [each / sum(raw) for each in raw]
        if method == "multislerp":
            alone = run(tmp_path, [{name: m[name]} for m in models], weights=w, method=method)
            torch.testing.assert_close(tensor, alone[name], rtol=1e-13, atol=1e-13)
        else:
            torch.testing.assert_close(
                tensor, w[0] * models[0][name] + w[1] * models[1][name], rtol=0, atol=1e-14
            )


def test_without_normalize_weights_are_used_as_they_are(tmp_path):
    models = inputs()
    base = inputs(1)[0]
    settings = (ModelSettings(weight=2.0), ModelSettings(weight=(0.0, -1.0)))
    merged = run(tmp_path, models, base, method="task_arithmetic", models=settings, normalize=False)
    for name, tensor in merged.items():
        delta = 2 * (models[0][name] - base[name]) - position(name) * (models[1][name] - base[name])
        torch.testing.assert_close(tensor, base[name] + delta, rtol=0, atol=1e-13)


def test_scale_along_the_layers(tmp_path):
    models = inputs()
    base = inputs(1)[0]
    merged = run(tmp_path, models, base, method="linear", scale=(0.0, 2.0))
    for name, tensor in merged.items():
        mean = (models[0][name] + models[1][name]) / 2
        truth = base[name] + 2 * position(name) * (mean - base[name])
        torch.testing.assert_close(tensor, truth, rtol=0, atol=1e-13)


def test_slerps_place_by_name(tmp_path):
    models = inputs()
    merged = run(
        tmp_path, models, method="slerp", t=(Case(0.0, "attn"), Case(1.0, "mlp"), Case(0.25))
    )
    for name, tensor in merged.items():
        end = models[0] if "attn" in name else models[1] if "mlp" in name else None
        assert end is None or torch.equal(tensor, end[name])
    alone = run(tmp_path, [{"lm_head": m["lm_head"]} for m in models], method="slerp", t=0.25)
    assert torch.equal(merged["lm_head"], alone["lm_head"])


def test_passthrough_scales(tmp_path):
    model = inputs(1)
    assert all(
        torch.equal(t, model[0][n]) for n, t in run(tmp_path, model, method="passthrough").items()
    )
    merged = run(tmp_path, model, method="passthrough", scale=(Case(0.0, "attn"), Case(2.0)))
    for name, tensor in merged.items():
        assert torch.equal(tensor, model[0][name] * (0.0 if "attn" in name else 2.0))


# ---- what configs refuse
GIVEN = {
    "scale": 0.5,
    "density": 0.5,
    "gamma": 0.2,
    "epsilon": 0.1,
    "select_topk": 0.5,
    "t": 0.3,
    "seed": 3,
    "weights": (1.0, 2.0),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_its_own_parameters_and_no_other(method):
    needed = {"density": 0.5} if METHODS[method].takes("density") else {}
    assert MergeConfig(
        method=method,
        **needed,
        **{k: v for k, v in GIVEN.items() if METHODS[method].takes(k) and k not in needed},
    )
    for name, value in GIVEN.items():
        if not METHODS[method].takes(name):
            with pytest.raises(
                InputError, match=f"^{name}: must be absent: method {method} takes no {name}, got"
            ):
                MergeConfig(method=method, **{name: value}, **needed)
    for name in ("weight", "density", "gamma", "epsilon"):
        if not METHODS[method].takes(name if name != "weight" else "weights"):
            words = re.escape(f"models[0].{name}: must be absent: method {method} takes no {name}")
            with pytest.raises(InputError, match=words):
                MergeConfig(method=method, models=(ModelSettings(**{name: 0.5}),), **needed)


@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if method.takes("density")]
)
def test_density_must_be_given_once_for_every_model(method):
    with pytest.raises(InputError, match=f"density: must be given for method {method}, got None"):
        MergeConfig(method=method)
    with pytest.raises(InputError, match="density: must be given"):
        MergeConfig(method=method, models=(ModelSettings(density=0.5), ModelSettings()))
    assert MergeConfig(
        method=method, models=(ModelSettings(density=0.5), ModelSettings(density=0.1))
    )


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(method="ties", density=1.5), "density: must be between 0 and 1, got 1.5"),
        (dict(method="ties", density=(0.5, -0.1)), "density: must be between 0 and 1, got -0.1"),
        (
            dict(method="ties", density=(Case((0.1, 2.0), "mlp"), Case(0.5))),
            "density: must be between 0 and 1, got 2.0",
        ),
        (
            dict(method="ties", density=()),
            "density: must be a number or a list of at least one, got []",
        ),
        (dict(method="ties", density=float("nan")), "density: must be between 0 and 1, got nan"),
        (dict(method="slerp", t=1.1), "t: must be between 0 and 1, got 1.1"),
        (dict(scale=float("inf")), "scale: must be a finite number, got inf"),
        (
            dict(models=(ModelSettings(weight=float("inf")),)),
            "models[0].weight: must be a finite number, got inf",
        ),
        (
            dict(seed=-1, method="dare_ties", density=0.5),
            "seed: must be between 0 and 2^63 - 1, got -1",
        ),
        (
            dict(method="slerp", stats=True),
            "stats: must be absent: method slerp reads its inputs twice for itself",
        ),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(InputError, match="^" + re.escape(message)):
        MergeConfig(**options)


def test_configs_replay():
    config = MergeConfig(
        method="ties",
        density=(Case((0.1, 0.9), "mlp"), Case(0.5)),
        models=(ModelSettings(weight=(1.0, 2.0)), ModelSettings(weight=1.0, density=0.25)),
    )
    assert parse(MergeConfig, to_plain(config), "here") == config


def test_as_many_settings_as_models(tmp_path):
    with pytest.raises(InputError, match=r"merge.models: must have 2 entries, got 1"):
        run(tmp_path, inputs(), models=(ModelSettings(weight=1.0),))
