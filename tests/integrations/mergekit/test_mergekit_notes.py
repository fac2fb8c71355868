"""Files that are no recipe, options of the command line, and notes on accepted keys."""

from pathlib import Path

import pytest
from support.merge.refusals import LINEAR, TIES

from merit_fast.errors import InputError
from merit_fast.integrations.mergekit.recipe import read_mergekit
from merit_fast.merge.tokenizer_options import TokenizerOptions, TokenRow, TokenSource


@pytest.mark.parametrize(
    "text,message",
    [
        (
            "dtype: float32\ndtype: float16\n",
            "r.yml:2: is not valid YAML: key 'dtype' appears twice",
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
        match="^command line: density: is set by the recipe; next to it go seed, missing,",
    ):
        read(TIES, "density=0.5")
    stacked = "slices: [{sources: [{model: m0, layer_range: [0, 1]}]}]\nmerge_method: passthrough"
    with pytest.raises(
        InputError, match="^command line: stats: must be false where a recipe stacks slices$"
    ):
        read(stacked, "stats=true")


def test_where_a_method_is_not_mergekits_to_the_bit_it_is_said(read):
    drawn = "our seed draws the dropped elements, the others are divided by their probability;"
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
        "dtype: float32 is what mergekit computes in; here it is float64, rounded once to "
        "out_dtype bfloat16",
        "models[0].parameters.density: has no effect with method task_arithmetic, nor has it in "
        "mergekit",
        "models[0].parameters.normalize: has no effect on one model, nor has it in mergekit",
        "parameters.int8_mask: has no effect with method task_arithmetic, nor has it in mergekit",
    )


@pytest.mark.parametrize(
    "line,source",
    [
        ("tokenizer_source: union", "union"),
        ("tokenizer_source: m2", "m2"),
        ("tokenizer: {source: base}", "base"),
        ("tokenizer: {}", "union"),
        ("tokenizer: {source: {model: {path: m0}}}", "m0"),
    ],
)
def test_a_tokenizer_becomes_an_option(read, line, source):
    recipe = read(LINEAR.replace("linear", f"linear\n{line}"))
    assert recipe.config.tokenizer_options == TokenizerOptions(source)


def test_rows_of_tokens_name_the_recipes_models(read):
    line = (
        "tokenizer: {source: base, pad_to_multiple_of: 8, tokens: {a: {source: m2, force: true}, "
        "b: {source: {kind: zero}}, c: {source: {kind: model_token, model: m0, token_id: 1}}}}"
    )
    options = read(LINEAR.replace("linear", f"linear\n{line}")).config.tokenizer_options
    assert options.pad_to_multiple_of == 8
    assert options.tokens == {
        "a": TokenSource("m2", force=True),
        "b": TokenSource(TokenRow("zero")),
        "c": TokenSource(TokenRow(model="m0", token_id=1)),
    }


def test_a_chat_template_becomes_an_option(read):
    for value in ("auto", "chatml", "{{ messages }}"):
        recipe = LINEAR.replace("linear", f"linear\nchat_template: '{value}'")
        assert read(recipe).config.chat_template == value
