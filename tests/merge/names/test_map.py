"""The shipped map against the installed transformers."""

import json
import random

import pytest
import transformers
from support.merge.names.write_map import (
    MAP_FILE,
    build,
    class_names,
    describe_class,
    describe_rules,
    settle,
    text_models,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from merit_fast.merge.read.names.model_class import class_of_config
from merit_fast.merge.read.names.rules import Renamer, conversion_map, numberless

AGAIN = "write it again: python tests/support/merge/names/write_map.py"
CLASSES = [
    "DeepseekV3ForCausalLM", "DeepseekV4ForCausalLM", "Ernie4_5_VLMoeForConditionalGeneration",
    "GPT2LMHeadModel", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma3Model",
    "LlavaForConditionalGeneration", "MaskFormerForInstanceSegmentation", "MixtralForCausalLM",
    "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
    "Qwen3MoeForCausalLM", "Qwen3VLMoeForConditionalGeneration", "ViTForImageClassification",
    "Wav2Vec2ForCTC",
]  # fmt: skip


def test_the_map_is_that_of_the_installed_transformers():
    assert conversion_map()["transformers"] == transformers.__version__, AGAIN
    assert conversion_map()["rules"] == json.loads(json.dumps(describe_rules())), AGAIN
    assert conversion_map()["text_models"] == text_models(), AGAIN
    listed = set(conversion_map()["classes"])
    assert listed <= class_names() and len(listed) > 1400, AGAIN
    assert MAP_FILE.stat().st_size < 1 << 20


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_transformers_rules_and_names(name):
    assert conversion_map()["classes"][name] == describe_class(name), AGAIN
    model_class = getattr(transformers, name)
    config = model_class.config_class()
    settle(config, 2)
    model = build(model_class, config)
    kind = class_of_config(json.loads(config.to_json_string()) | {"architectures": [name]})
    theirs = get_model_conversion_mapping(model)
    assert [(rule.kind, list(rule.sources), rule.scope) for rule in kind.rules] == [
        (type(rule).__name__, rule.source_patterns, rule.scope_prefix) for rule in theirs
    ]
    known = model.state_dict()
    names = {*known, *revert_weight_conversion(model, dict(known))}
    names |= {f"{model.base_model_prefix}.{name}" for name in names}
    names |= {name.partition(".")[2] for name in names}
    converters = [rule for rule in theirs if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in theirs if not isinstance(rule, WeightConverter)]
    renamer = Renamer(kind.rules)
    for old in sorted(names - {""}, key=dot_natural_key):
        prefix = model.base_model_prefix
        expected = rename_source_key(old, renamings, converters, prefix, known)[0]
        if expected not in known and old in known:
            expected = old
        mine = old if numberless(old) in kind.kept else renamer.converted(renamer.renamed(old))[0]
        if expected in known:
            assert kind.with_prefix(mine) == expected, old


def test_a_class_drawn_at_random_is_as_it_was_written():
    for name in random.sample(sorted(conversion_map()["classes"]), 3):
        assert conversion_map()["classes"][name] == describe_class(name), f"{name}: {AGAIN}"
