"""Files of several recipes, and models of the hub by their revision."""

import os

import pytest
import torch
import yaml
from support.merge.merges import load

from merit_fast.errors import InputError
from merit_fast.integrations.mergekit.run import merge_mergekit
from merit_fast.integrations.mergekit.several import read_steps
from merit_fast.integrations.mergekit.texts import text_values
from merit_fast.options.yaml import read_yaml, read_yaml_documents
from merit_fast.progress import SilentProgress

CHAIN = """
merge_method: slerp
base_model: first
models: [{model: first}, {model: second}]
parameters: {t: 0.25}
---
name: second
merge_method: linear
models: [{model: first, parameters: {weight: 1}}, {model: m2, parameters: {weight: 1}}]
dtype: float32
---
name: first
merge_method: linear
models: [{model: m0, parameters: {weight: 1}}, {model: m1, parameters: {weight: 3}}]
dtype: float64
"""


def run(text, tmp_path, **options):
    file = tmp_path / "r.yml"
    file.write_text(text)
    return merge_mergekit(file, str(tmp_path / "out"), SilentProgress(), **options)


def test_outputs_with_names_feed_other_recipes(inside, tmp_path):
    summary = run(
        CHAIN.replace("\nmerge_method: slerp", "dtype: float32\nmerge_method: slerp", 1), tmp_path
    )
    assert list(summary["steps"]) == ["first", "second"]
    first = load(tmp_path / "out.steps/first")
    second = load(tmp_path / "out.steps/second")
    merged = load(tmp_path / "out")
    for name, tensor in inside[0].items():
        truth = 0.25 * tensor.double() + 0.75 * inside[1][name].double()
        assert torch.equal(first[name], truth)
        mean = (truth + inside[2][name].double()) / 2
        assert torch.equal(second[name], mean.float())
    torch.testing.assert_close(
        merged["model.norm.weight"],
        (0.75 * first["model.norm.weight"] + 0.25 * second["model.norm.weight"].double()).float(),
    )


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("name: first", "name: second", "r.yml: name: must stand once, got 'second' twice"),
        ("name: first", "name: a/b", "document 3: name: must be the name of a folder without"),
        ("name: first", "name: ..", "document 3: name: must be the name of a folder without"),
        ("name: first\n", "", "must have one document without a name, whose output is OUT"),
        ("m0, param", "second, param", "the outputs second, first need each other"),
        ("merge_method: linear", "merge_method: liner", "document second: merge_method: liner is"),
        ("model: m2", "model: first@v2", r"models\[1\].model: must have no revision, as first"),
        ("name: second\n", "- 1\n", "is not valid YAML"),
    ],
)
def test_bad_files_are_refused_before_the_first_merge(inside, tmp_path, old, new, message):
    assert old in CHAIN
    with pytest.raises(InputError, match=message):
        run(CHAIN.replace(old, new, 1), tmp_path)
    assert os.listdir(tmp_path) == ["r.yml"]


@pytest.mark.parametrize("options", [{"dry_run": True}, {"share": (1, 2)}])
def test_options_of_one_recipe(inside, tmp_path, options):
    with pytest.raises(InputError, match="goes with one recipe, got several documents"):
        run(CHAIN, tmp_path, **options)


def test_a_file_of_several_documents_is_no_config(tmp_path):
    (tmp_path / "a.yml").write_text("a: 1\n---\nb: 2\n")
    with pytest.raises(InputError, match="a.yml: must hold one document, got 2 between --- lines"):
        read_yaml(tmp_path / "a.yml")


@pytest.mark.parametrize("text", ["[" * 3000, "{a: " * 3000, "- " * 3000, "? " * 3000])
def test_deep_yaml_is_one_line(tmp_path, text):
    (tmp_path / "a.yml").write_text(text)
    with pytest.raises(InputError, match="a.yml:1: is not valid YAML: must be nested at most 100"):
        read_yaml(tmp_path / "a.yml")
    (tmp_path / "a.yml").write_text("[" * 90 + "]" * 90)
    assert isinstance(read_yaml(tmp_path / "a.yml"), list)


@pytest.fixture
def hub(inside, folder, tmp_path, monkeypatch):
    """A hub cache with two revisions of org/model: m1 on main, m2 on v2."""
    import huggingface_hub.constants

    cache = tmp_path / "hub" / "models--org--model"
    for branch, model in (("main", "m1"), ("v2", "m2")):
        commit = model[1] * 40
        (cache / "snapshots").mkdir(parents=True, exist_ok=True)
        (cache / "snapshots" / commit).symlink_to(folder / model)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / branch).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "model, number",
    [
        ("org/model", 1),
        ("org/model@v2", 2),
        ("org/model@" + "2" * 40, 2),
        ({"model": {"path": "org/model", "revision": "v2"}}, 2),
    ],
)
def test_a_revision_of_the_hub(hub, inside, tmp_path, model, number):
    recipe = {"merge_method": "passthrough", "models": [{"model": model}]}
    run(yaml.safe_dump(recipe), tmp_path)
    found = load(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in inside[number].items())


def test_a_revision_that_is_not_there(hub, tmp_path):
    recipe = {"merge_method": "passthrough", "models": [{"model": "org/model@v3"}]}
    with pytest.raises(InputError, match=r"models\[0\].model: org/model@v3: not a folder, and"):
        run(yaml.safe_dump(recipe), tmp_path)


def test_a_tokenizer_comes_from_another_recipes_output(inside, tmp_path):
    text = CHAIN.replace("\nmerge_method: slerp", "tokenizer: {source: first}\nmerge_method: slerp")
    file = tmp_path / "r.yml"
    file.write_text(text)
    steps = read_steps(file, read_yaml_documents(file), tmp_path / "out")
    last = steps[-1].document
    values = text_values(last, {})
    assert values == {"tokenizer": {"source": str(tmp_path / "out.steps/first")}}
