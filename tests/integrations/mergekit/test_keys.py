"""Every key of mergekit 0.1.5's recipes is read: a value that cannot be right is refused by it."""

import copy

import pytest
import yaml

from merit_fast.errors import InputError
from merit_fast.integrations.mergekit.recipe import read_mergekit

MODELS = {
    "merge_method": "ties",
    "base_model": "m0",
    "models": [
        {"model": {"model": {"path": "m1"}}, "parameters": {"weight": 1, "density": 0.5}},
    ],
    "parameters": {"normalize": True},
}
SLICES = {
    "merge_method": "slerp",
    "base_model": "m0",
    "slices": [
        {
            "sources": [
                {"model": "m0", "layer_range": [0, 2]},
                {"model": "m1", "layer_range": [0, 2]},
            ],
            "parameters": {"t": 0.5},
        }
    ],
}
MODULES = {
    "merge_method": "linear",
    "modules": {"default": {"models": [{"model": "m0"}, {"model": "m1"}]}},
    "parameters": {"weight": 1},
}
# The fields of MergeConfiguration and of the classes in it, by the path that leads to each.
KEYS = [
    (MODELS, "merge_method"),
    (MODELS, "base_model"),
    (MODELS, "dtype"),
    (MODELS, "out_dtype"),
    (MODELS, "tokenizer_source"),
    (MODELS, "tokenizer"),
    (MODELS, "chat_template"),
    (MODELS, "parameters"),
    (MODELS, "models"),
    (MODELS, "models.0.model"),
    (MODELS, "models.0.parameters"),
    (MODELS, "models.0.model.model"),
    (MODELS, "models.0.model.lora"),
    (MODELS, "models.0.model.override_architecture"),
    (MODELS, "models.0.model.model.path"),
    (MODELS, "models.0.model.model.revision"),
    (SLICES, "slices"),
    (SLICES, "slices.0.sources"),
    (SLICES, "slices.0.base_model"),
    (SLICES, "slices.0.residual_weight"),
    (SLICES, "slices.0.parameters"),
    (SLICES, "slices.0.sources.0.model"),
    (SLICES, "slices.0.sources.0.layer_range"),
    (SLICES, "slices.0.sources.0.parameters"),
    (MODULES, "modules"),
    (MODULES, "modules.default.models"),
    (MODULES, "modules.default.slices"),
    (MODULES, "modules.default.parameters"),
]


def with_value(recipe, path, value):
    changed = copy.deepcopy(recipe)
    *parents, last = path.split(".")
    node = changed
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node[parent]
    node[last] = value
    return changed


@pytest.mark.parametrize("recipe, path", KEYS, ids=[path for _, path in KEYS])
def test_a_key_is_read(inside, tmp_path, recipe, path):
    file = tmp_path / "r.yml"
    with pytest.raises(InputError) as error:
        file.write_text(yaml.safe_dump(with_value(recipe, path, {"nonsense": 1})))
        read_mergekit(file)
    last = path.rpartition(".")[2]
    assert str(error.value).startswith(f"{file}: ") or str(error.value).startswith("r.yml")
    assert last in str(error.value) or "nonsense" in str(error.value)


@pytest.mark.parametrize("recipe", [MODELS, SLICES, MODULES], ids=["models", "slices", "modules"])
def test_the_recipes_themselves_are_read(inside, tmp_path, recipe):
    file = tmp_path / "r.yml"
    file.write_text(yaml.safe_dump(recipe))
    assert read_mergekit(file).models
