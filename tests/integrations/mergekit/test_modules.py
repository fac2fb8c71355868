"""Recipes with modules: exactly the named towers merge, the base_model gives the others."""

import pytest
import torch
from safetensors.torch import load_file
from support.merge.names.models import load_whole, make, write_hub_form, write_memory_form

from merit_fast.errors import InputError
from merit_fast.integrations.mergekit.recipe import merge_recipe, read_mergekit
from merit_fast.progress import SilentProgress

INSIDE = {
    "text_decoder": ("model.language_model.", "lm_head."),
    "vision_tower": ("model.vision_tower.",),
    "multi_modal_projector": ("model.multi_modal_projector.",),
}


@pytest.fixture(scope="module")
def gemmas(tmp_path_factory):
    """Three multimodal models: m0 and m2 in published names, m1 in names in memory."""
    root = tmp_path_factory.mktemp("modules")
    models = [make("gemma3", seed) for seed in range(3)]
    for k, model in enumerate(models):
        (write_memory_form if k == 1 else write_hub_form)(model, root / f"m{k}")
    return root, models


def run(gemmas, monkeypatch, tmp_path, text):
    monkeypatch.chdir(gemmas[0])
    file = tmp_path / "r.yml"
    file.write_text(text)
    recipe = read_mergekit(file, ["dtype=fp32"])
    return merge_recipe(recipe, tmp_path / "out", SilentProgress())


def states(gemmas):
    return [model.state_dict() for model in gemmas[1]]


def tower_of(name):
    return next(tower for tower, heads in INSIDE.items() if name.startswith(heads))


def assert_towers(merged, expected):
    """``expected``: tower -> its value from the tensor's name, in float64."""
    for name, tensor in merged.items():
        wanted = expected[tower_of(name)](name)
        assert torch.allclose(tensor.double(), wanted, atol=1e-7, rtol=0), name


@pytest.mark.parametrize("tower", INSIDE)
def test_one_named_tower_merges_and_the_others_are_the_base_models(
    tower, gemmas, monkeypatch, tmp_path
):
    summary = run(
        gemmas,
        monkeypatch,
        tmp_path,
        f"""
        modules:
          {tower}:
            models:
              - {{model: m1, parameters: {{weight: 0.25}}}}
              - {{model: m2, parameters: {{weight: 0.75}}}}
        base_model: m0
        merge_method: task_arithmetic""",
    )
    z, one, two = states(gemmas)
    merged = load_whole(type(gemmas[1][0]), tmp_path / "out")

    def moved(name):
        start = z[name].double()
        return start + 0.25 * (one[name].double() - start) + 0.75 * (two[name].double() - start)

    unmoved = dict.fromkeys(INSIDE, lambda name: z[name].double())
    assert_towers(merged, unmoved | {tower: moved})
    others = ", ".join(sorted(set(INSIDE) - {tower}))
    assert any(f"gives {others} as they are" in note for note in summary["notes"])
    stored = load_file(gemmas[0] / "m0" / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == stored.keys()


def test_several_towers_have_models_and_numbers_of_their_own(gemmas, monkeypatch, tmp_path):
    summary = run(
        gemmas,
        monkeypatch,
        tmp_path,
        """
        modules:
          text_decoder:
            slices:
              - sources:
                  - {model: m0, layer_range: [0, 2], parameters: {weight: 1}}
                  - {model: m1, layer_range: [0, 2], parameters: {weight: 3}}
          vision_tower:
            models: [{model: m2, parameters: {weight: 1}}, {model: m0, parameters: {weight: 1}}]
            parameters: {normalize: false}
        base_model: m0
        merge_method: linear""",
    )
    assert {number for _, number in [*summary["models"], *summary["coefficients"]]} == {None}
    zero, one, two = states(gemmas)
    merged = load_whole(type(gemmas[1][0]), tmp_path / "out")
    assert_towers(
        merged,
        {
            "text_decoder": lambda name: 0.25 * zero[name].double() + 0.75 * one[name].double(),
            "vision_tower": lambda name: two[name].double() + zero[name].double(),
            "multi_modal_projector": lambda name: zero[name].double(),
        },
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Towers" in card and "`vision_tower`: `m2`, `m0`" in card


@pytest.mark.parametrize("method", ["slerp\n        parameters: {t: 0.3}", "model_stock"])
def test_methods_that_compare_models_do_so_inside_the_tower(method, gemmas, monkeypatch, tmp_path):
    models = "[{model: m0}, {model: m1}]" if "slerp" in method else "[{model: m1}, {model: m2}]"
    text = f"""
        MODELS
        base_model: m0
        dtype: float32
        merge_method: {method}"""
    whole = text.replace("MODELS", f"models: {models}")
    part = text.replace("MODELS", f"modules: {{vision_tower: {{models: {models}}}}}")
    merged = []
    for k, recipe in enumerate((whole, part)):
        (tmp_path / str(k)).mkdir()
        run(gemmas, monkeypatch, tmp_path / str(k), recipe)
        merged.append(load_whole(type(gemmas[1][0]), tmp_path / str(k) / "out"))
    base = states(gemmas)[0]
    for name, tensor in merged[1].items():
        wanted = merged[0] if tower_of(name) == "vision_tower" else base
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize(
    "modules,rule",
    [
        (
            "nonsense_tower: {models: [{model: m1}]}",
            "modules.nonsense_tower: is no tower of .*; there are multi_modal_projector, "
            "text_decoder, vision_tower",
        ),
        (
            "default: {models: [{model: m1}]}",
            "modules.default: is no tower of .*; there are multi_modal_projector, text_decoder",
        ),
        (
            "text_decoder: {slices: [{sources: [{model: m1, layer_range: [0, 1]}]}]}",
            "slices of the tower text_decoder must keep its depth",
        ),
    ],
)
def test_wrong_modules_are_refused_before_a_byte_is_written(
    modules, rule, gemmas, monkeypatch, tmp_path
):
    text = (
        f"modules: {{{modules}}}\nbase_model: m0\nmerge_method: linear\nparameters: {{weight: 1}}"
    )
    with pytest.raises(InputError, match=rule):
        run(gemmas, monkeypatch, tmp_path, text)
    assert not (tmp_path / "out").exists()


def test_towers_that_nobody_gives_need_a_base_model(gemmas, monkeypatch, tmp_path):
    text = "modules: {text_decoder: {models: [{model: m1}]}}\nmerge_method: linear"
    text += "\nparameters: {weight: 1}"
    with pytest.raises(InputError, match="base_model: is required: it gives the towers multi_mod"):
        run(gemmas, monkeypatch, tmp_path, text)
