"""Refusals of mergekit recipes, each by its exact line."""

import pytest
from support.merge.refusals import LINEAR, TIES

from merit_fast.errors import InputError
from merit_fast.merge.table import METHODS

TOP = (
    "merge_method, base_model, models, slices, modules, parameters, dtype, out_dtype, "
    "tokenizer_source, tokenizer, "
    "chat_template, lazy_unpickle, lazy_loader, low_cpu_memory, clone_tensors, read_to_gpu"
)


METHOD_NAMES = ", ".join(METHODS)


SLERP = """
slices:
  - sources: [{model: m0, layer_range: [0, 2]}, {model: m1, layer_range: [0, 2]}]
  - sources: [{model: m0, layer_range: [2, 4]}, {model: m1, layer_range: [2, 4]}]
merge_method: slerp
base_model: m0
parameters: {t: 0.5}
"""


@pytest.mark.parametrize(
    "recipe,old,new,line",
    [
        (TIES, "ties", "tise", f"merge_method: tise is unknown; there are {METHOD_NAMES}"),
        (TIES, "base_model", "base_modell", f"base_modell: is not supported; valid keys: {TOP}"),
        (
            TIES,
            "weight: 1}}]",
            "wieght: 1}}]",
            "models[1].parameters.wieght: is no parameter; ties takes weight, density, "
            "normalize, lambda, rescale",
        ),
        (
            TIES,
            "{model: m1,",
            "{model: m1, layer_range: [0, 4],",
            "models[0].layer_range: is not supported; valid keys: model, parameters",
        ),
        (
            TIES,
            "m1,",
            "m1@main,",
            "models[0].model: must have no revision, as m1 is a folder, got 'm1@main'",
        ),
        (
            TIES,
            "m1,",
            "{model: {path: m1, revision: x}},",
            "models[0].model.model: must have no revision, as m1 is a folder, got 'm1@x'",
        ),
        (
            TIES,
            "m1,",
            "{model: m1, override_architecture: x},",
            "models[0].model.override_architecture: must be absent: names of tensors come from the "
            "files and config.json",
        ),
        (
            TIES,
            "m1,",
            "m1+a+b,",
            "models[0].model: must name at most one adapter and one revision, got 'a+b'",
        ),
        (
            TIES,
            "m1,",
            "m1+adapter,",
            "models[0].model: an adapter must sit on m0, as base_model or other adapters do, got "
            "m1",
        ),
        (
            TIES,
            "base_model: m0",
            "base_model: m0+adapter",
            "base_model: must be a whole model, got the adapter m0+adapter",
        ),
        (TIES, "m1,", "m2,", "models[1].model: m2 stands twice"),
        (TIES, "base_model: m0\n", "", "base_model: is required by method ties"),
        (
            TIES,
            "m2, parameters: {weight: 1}",
            "m2",
            "models[1].parameters.weight: is required by method ties",
        ),
        (
            TIES,
            "weight: 1}}]",
            "weight: null}}]",
            "models[1].parameters.weight: must be a number, a list of numbers or of filters, got "
            "None",
        ),
        (
            TIES,
            "weight: 1}}]",
            "weight: half}}]",
            "models[1].parameters.weight: must be a finite number, got 'half'",
        ),
        (
            TIES,
            "weight: 1}}]",
            "weight: [{value: 1}, 2]}}]",
            "models[1].parameters.weight: a list of filters must hold mappings only, got 2",
        ),
        (
            TIES,
            "weight: 1}}]",
            "weight: {value: 1, fliter: a}}}]",
            "models[1].parameters.weight.fliter: is not supported; valid keys: value, filter",
        ),
        (
            TIES,
            "weight: 1}}]",
            "weight: 1, density: 2}}]",
            "models[1].parameters.density: must be between 0 and 1, got 2",
        ),
        (
            TIES,
            "ties",
            "ties\nparameters: {normalize: [true, false]}",
            "parameters.normalize: must be the same for all tensors",
        ),
        (
            TIES,
            "ties",
            "ties\nparameters: {normalize: 2}",
            "parameters.normalize: must be true or false, got 2",
        ),
        (
            TIES,
            "ties",
            "ties\ndtype: int64",
            "dtype: must be one of bfloat16, float16, float32, float64, got 'int64'",
        ),
        (
            TIES,
            "ties",
            "ties\nslices: [{}]",
            "the top level: must have exactly one of models, slices and modules",
        ),
        (
            SLERP,
            "sources: [{model: m0, layer_range: [2, 4]}, ",
            "sources: [",
            "slices[1].sources: must hold the base_model m0, from which slerp starts",
        ),
        (
            SLERP,
            "[2, 4]}, {",
            "[2, 3]}, {",
            "slices[1].sources[1].layer_range: must span 1 layers as in sources[0], got 2",
        ),
        (
            SLERP,
            "[0, 2]}, {",
            "[2, 2]}, {",
            "slices[0].sources[0].layer_range: must be [first, end] with 0 <= first < end, got "
            "[2, 2]",
        ),
        (
            SLERP,
            "slices:\n  - sources",
            "slices:\n  - residual_weight: 0.1\n    sources",
            "slices[0].residual_weight: must be absent: mergekit 0.1.5 does not read it either",
        ),
        (SLERP, "parameters: {t: 0.5}", "", "parameters.t: is required by method slerp"),
        (
            SLERP,
            "{model: m1, layer_range: [2",
            "{model: m2, layer_range: [2, 4]}, {model: m1, layer_range: [2",
            "slices[0].sources: must be as many in every slice, got 2 and 3",
        ),
        (
            "modules: {a: {}, b: {}}\nmerge_method: linear",
            "a",
            "a",
            "modules.a: must have exactly one of models and slices",
        ),
        (
            LINEAR,
            "linear",
            "linear\ntokenizer_source: ids",
            "tokenizer.source: must be union, base or a model, got 'ids'",
        ),
        (
            LINEAR,
            "linear",
            "linear\ntokenizer_source: union\ntokenizer: {}",
            "tokenizer_source: must be absent next to tokenizer",
        ),
        (
            LINEAR,
            "linear",
            "linear\ntokenizer: {toknes: {}}",
            "tokenizer.toknes: is not supported; valid keys: source, tokens, pad_to_multiple_of",
        ),
        (
            LINEAR,
            "linear",
            "linear\ntokenizer: {tokens: {a: {source: m1}}}",
            "tokenizer.tokens.a.source: must be one of the recipe's models, m0, m2, got 'm1'",
        ),
        (
            LINEAR,
            "linear",
            "linear\ntokenizer: {tokens: {a: {}}}",
            "tokenizer.tokens.a.source: must be given, got None",
        ),
        (
            LINEAR,
            "linear",
            "linear\ntokenizer: {tokens: {a: {source: {kind: model_token, model: m0}}}}",
            "tokenizer.tokens.a.source.token: must be given, or token_id instead, and not both, "
            "got None",
        ),
        (
            LINEAR,
            "linear",
            "linear\nchat_template: 3",
            "chat_template: must be a string, got 3",
        ),
    ],
)
def test_what_we_lack_is_named(read, recipe, old, new, line):
    assert old in recipe
    with pytest.raises(InputError) as error:
        read(recipe.replace(old, new, 1))
    assert str(error.value) == f"r.yml: {line}"


def test_a_model_that_is_not_there_is_named(read):
    rule = r"nowhere: not a folder, and the hub is switched off \(HF_HUB_OFFLINE\)$"
    with pytest.raises(InputError, match=rf"^r.yml: models\[0\].model: {rule}"):
        read(TIES.replace("m1", "nowhere"))
