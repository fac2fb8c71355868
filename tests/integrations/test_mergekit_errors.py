"""What a mergekit recipe may not say, each by its exact line; and what is let through with a note."""

import json
from pathlib import Path

import pytest
import yaml

from merit_fast.errors import InputError
from merit_fast.integrations.mergekit.recipe import read_mergekit
from merit_fast.merge.table import METHODS

TOP = (
    "merge_method, base_model, models, slices, modules, parameters, dtype, out_dtype, tokenizer_source, tokenizer, "
    "chat_template, lazy_unpickle, lazy_loader, low_cpu_memory, clone_tensors, read_to_gpu"
)
METHOD_NAMES = ", ".join(METHODS)
TIES = """
models: [{model: m1, parameters: {weight: 1}}, {model: m2, parameters: {weight: 1}}]
merge_method: ties
base_model: m0
"""
SLERP = """
slices:
  - sources: [{model: m0, layer_range: [0, 2]}, {model: m1, layer_range: [0, 2]}]
  - sources: [{model: m0, layer_range: [2, 4]}, {model: m1, layer_range: [2, 4]}]
merge_method: slerp
base_model: m0
parameters: {t: 0.5}
"""
LINEAR = "models: [{model: m0}, {model: m2}]\nmerge_method: linear\nparameters: {weight: 1}\n"


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a recipe beside directories m0, m1, m2 and an adapter; the tokenizer of m2 has another token."""
    monkeypatch.chdir(tmp_path)
    for k in range(3):
        Path(f"m{k}").mkdir()
        vocabulary = {
            "model": {"vocab": {"a": 0, "b": 1 + k // 2}},
            "added_tokens": [{"id": 7, "content": "<s>"}],
        }
        Path(f"m{k}/tokenizer.json").write_text(json.dumps(vocabulary))
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")

    def run(text, *assignments):
        Path("r.yml").write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        return read_mergekit(Path("r.yml"), assignments)

    return run


@pytest.mark.parametrize(
    "recipe,old,new,line",
    [
        (TIES, "ties", "nuslerp", f"merge_method: nuslerp is not among ours; there are {METHOD_NAMES}"),
        (TIES, "ties", "tise", f"merge_method: tise is unknown; there are {METHOD_NAMES}"),
        (TIES, "base_model", "base_modell", f"base_modell: is not supported; valid keys: {TOP}"),
        (
            TIES, "weight: 1}}]", "wieght: 1}}]",
            "models[1].parameters.wieght: is no parameter; ties takes weight, density, normalize, lambda, rescale",
        ),
        (
            TIES, "{model: m1,", "{model: m1, layer_range: [0, 4],",
            "models[0].layer_range: is not supported; valid keys: model, parameters",
        ),
        (TIES, "m1,", "m1@main,", "models[0].model: must name no revision and at most one adapter, got 'm1@main'"),
        (
            TIES, "m1,", "{model: {path: m1, revision: x}},",
            "models[0].model.model.revision: is not supported; valid keys: path",
        ),
        (
            TIES, "m1,", "{model: m1, override_architecture: x},",
            "models[0].model.override_architecture: is not supported; valid keys: model, lora",
        ),
        (TIES, "m1,", "m1+a+b,", "models[0].model: must name no revision and at most one adapter, got 'a+b'"),
        (
            TIES, "m1,", "m1+adapter,",
            "models[0].model: an adapter must sit on m0, as base_model or other adapters do, got m1",
        ),
        (
            TIES, "base_model: m0", "base_model: m0+adapter",
            "base_model: must be a whole model, got the adapter m0+adapter",
        ),
        (TIES, "m1,", "m2,", "models[1].model: m2 stands twice"),
        (TIES, "base_model: m0\n", "", "base_model: is required by method ties"),
        (TIES, "m2, parameters: {weight: 1}", "m2", "models[1].parameters.weight: is required by method ties"),
        (
            TIES, "weight: 1}}]", "weight: null}}]",
            "models[1].parameters.weight: must be a number, a list of numbers or of filters, got None",
        ),
        (TIES, "weight: 1}}]", "weight: half}}]", "models[1].parameters.weight: must be a finite number, got 'half'"),
        (
            TIES, "weight: 1}}]", "weight: [{value: 1}, 2]}}]",
            "models[1].parameters.weight: a list of filters must hold mappings only, got 2",
        ),
        (
            TIES, "weight: 1}}]", "weight: {value: 1, fliter: a}}}]",
            "models[1].parameters.weight.fliter: is not supported; valid keys: value, filter",
        ),
        (
            TIES, "weight: 1}}]", "weight: 1, density: 2}}]",
            "models[1].parameters.density: must be between 0 and 1, got 2",
        ),
        (TIES, "ties", "ties\nparameters: {rescale: true}", "parameters.rescale: must be false with method ties"),
        (TIES, "ties", "della\nparameters: {rescale: false}", "parameters.rescale: must be true with method della"),
        (
            TIES, "ties", "model_stock\nparameters: {filter_wise: true}",
            "parameters.filter_wise: must be false with method model_stock",
        ),
        (TIES, "ties", "multislerp\nparameters: {eps: 1e-6}", "parameters.eps: must be 1e-8, got '1e-6'"),
        (
            TIES, "ties", "ties\nparameters: {normalize: [true, false]}",
            "parameters.normalize: must be the same for all tensors",
        ),
        (TIES, "ties", "ties\nparameters: {normalize: 2}", "parameters.normalize: must be true or false, got 2"),
        (TIES, "ties", "ties\ndtype: int64", "dtype: must be one of bfloat16, float16, float32, got 'int64'"),
        (TIES, "ties", "ties\nslices: [{}]", "the top level: must have exactly one of models, slices and modules"),
        (
            SLERP, "sources: [{model: m0, layer_range: [2, 4]}, ", "sources: [",
            "slices[1].sources: must hold the base_model m0, from which slerp starts",
        ),
        (
            SLERP, "[2, 4]}, {", "[2, 3]}, {",
            "slices[1].sources[1].layer_range: must span 1 layers as in sources[0], got 2",
        ),
        (
            SLERP, "[0, 2]}, {", "[2, 2]}, {",
            "slices[0].sources[0].layer_range: must be [first, end] with 0 <= first < end, got [2, 2]",
        ),
        (
            SLERP, "slices:\n  - sources", "slices:\n  - residual_weight: 0.1\n    sources",
            "slices[0].residual_weight: is not supported; valid keys: sources, base_model, parameters",
        ),
        (SLERP, "parameters: {t: 0.5}", "", "parameters.t: is required by method slerp"),
        (
            SLERP, "{model: m1, layer_range: [2", "{model: m2, layer_range: [2, 4]}, {model: m1, layer_range: [2",
            "slices[0].sources: must be as many in every slice, got 2 and 3",
        ),
        (
            "modules: {a: {}, b: {}}\nmerge_method: linear", "a", "a",
            "modules: must be a mapping of one module, got {'a': {}, 'b': {}}",
        ),
        (
            LINEAR, "linear", "linear\ntokenizer_source: union",
            "tokenizer_source: must be absent, as the vocabularies of m0 and m2 differ",
        ),
        (
            LINEAR, "linear", "linear\ntokenizer_source: m2",
            "tokenizer_source: must be one of union, base, m0, got 'm2'",
        ),
        (
            LINEAR, "linear", "linear\ntokenizer: {tokens: {}}",
            "tokenizer.tokens: is not supported; valid keys: source",
        ),
        (
            LINEAR, "linear", "linear\nchat_template: chatml",
            "chat_template: must be auto or absent, got 'chatml'",
        ),
    ],
)  # fmt: skip
def test_what_we_lack_is_named(read, recipe, old, new, line):
    assert old in recipe
    with pytest.raises(InputError) as error:
        read(recipe.replace(old, new, 1))
    assert str(error.value) == f"r.yml: {line}"


def test_a_model_that_is_not_there_is_named(read):
    with pytest.raises(
        InputError,
        match=r"^r.yml: models\[0\].model: 'nowhere' is neither a directory nor a hub id that",
    ):
        read(TIES.replace("m1", "nowhere"))


def test_chat_templates_that_differ_are_not_chosen_among(read):
    recipe = LINEAR.replace("linear", "linear\nchat_template: auto")
    assert read(recipe).notes == ()
    Path("m2/chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(
        InputError, match="^r.yml: chat_template: must be absent, as those of m0 and m2 differ$"
    ):
        read(recipe)


@pytest.mark.parametrize(
    "text,message",
    [
        (
            "dtype: float32\ndtype: float16\n",
            "r.yml:2: is not valid YAML: key 'dtype' stands twice",
        ),
        ("a: [", "r.yml:1: is not valid YAML: expected the node content, but found '<stream end>'"),
        ("", "r.yml: the top level: must be a mapping of keys, got None"),
        ("models: [{model: m0}]", "r.yml: merge_method: must be the name of a method, got None"),
    ],
)
def test_files_that_are_no_recipe(read, text, message):
    with pytest.raises(InputError) as error:
        read(text)
    assert str(error.value) == message


def test_a_recipe_that_is_not_there(read):
    with pytest.raises(InputError, match="^nowhere.yml: does not exist$"):
        read_mergekit(Path("nowhere.yml"))


def test_the_command_line_sets_what_a_recipe_does_not_say(read):
    config = read(TIES, "threads=1", "dtype=bf16", "shard_size=4K").config
    assert (config.threads, config.dtype, config.shard_size) == (1, "bf16", "4K")
    with pytest.raises(
        InputError,
        match="^command line: density: is for the recipe to say; beside it go seed, missing,",
    ):
        read(TIES, "density=0.5")
    stacked = "slices: [{sources: [{model: m0, layer_range: [0, 1]}]}]\nmerge_method: passthrough"
    with pytest.raises(
        InputError, match="^command line: stats: must be false where a recipe stacks slices$"
    ):
        read(stacked, "stats=true")


def test_where_a_method_is_not_mergekits_to_the_bit_it_is_said(read):
    drawn = "what is dropped is drawn from our seed, what stays is divided by its probability; mergekit draws from"
    for method, said in (("dare_ties", drawn), ("della", drawn)):
        notes = read(TIES.replace("ties", method)).notes
        assert [note for note in notes if note.startswith(f"{method}: {said}")] == [notes[-1]]
    assert read(TIES).notes == ()


def test_what_has_no_effect_is_said(read):
    recipe = """
        models:
          - {model: m1, parameters: {weight: 1, density: 0.5, normalize: true}}
        base_model: m0
        merge_method: task_arithmetic
        parameters: {int8_mask: true}
        dtype: float32
        out_dtype: bfloat16
        lazy_unpickle: true"""
    assert read(recipe).notes == (
        "lazy_unpickle: is an option of mergekit's command line and has no effect in its file",
        "dtype: float32 is what mergekit computes in; here it is float64, rounded once to out_dtype bfloat16",
        "models[0].parameters.density: has no effect with method task_arithmetic, nor has it in mergekit",
        "models[0].parameters.normalize: has no effect on one model, nor has it in mergekit",
        "parameters.int8_mask: has no effect with method task_arithmetic, nor has it in mergekit",
    )


@pytest.mark.parametrize(
    "line", ["tokenizer_source: union", "tokenizer_source: m0", "tokenizer: {source: base}"]
)
def test_a_tokenizer_is_named_where_it_changes_nothing(read, line):
    recipe = LINEAR.replace("m2", "m1").replace("linear", f"linear\n{line}")
    note = "all models have one vocabulary; embeddings keep their rows, files come from m0"
    assert read(recipe).notes == (f"{line.partition(':')[0]}: {note}",)
