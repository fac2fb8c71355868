"""What lies beside the weights comes along, and config.json says what the tensors are."""

import json
import os

import pytest
from support.headers import one_tensor, pack, tensor, write_model

from merit_fast.errors import InputError
from merit_fast.merge.read.checkpoint import read_checkpoint
from merit_fast.merge.read.companions import (
    check_configs,
    copy_companions,
    find_head,
    is_tied,
    output_dtypes,
    untie_if_different,
)

TAKEN = {
    *(
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
    ),
    *(
        "spiece.model",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
    ),
    *(
        "chat_template.jinja",
        "chat_template.json",
        "preprocessor_config.json",
        "processor_config.json",
    ),
    *("video_preprocessor_config.json", "qwen.tiktoken", "tekken.json", "source.spm"),
    *("LICENSE", "LICENSE.txt", "License.md", "NOTICE", "USE_POLICY.md"),
}
LEFT = {
    *(
        "README.md",
        "model.safetensors",
        "pytorch_model.bin",
        "tokenizer.safetensors",
        "consolidated.00.pth",
    ),
    *(
        "modeling_own.py",
        "training_args.bin",
        "stage.json",
        "branch.json",
        "model.safetensors.index.json",
    ),
    *("tokenizer.json.part", ".gitattributes"),
}


def directory_of(path, names, config=None):
    model = write_model(path, {name: b"{}" for name in names})
    if config is not None:
        (model / "config.json").write_text(json.dumps(config))
    return model


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def test_all_that_a_model_needs_comes_along_and_nothing_else(tmp_path):
    model = directory_of(tmp_path / "model", TAKEN | LEFT)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ x }}")
    (model / "tokenizer").mkdir()
    out = write_model(tmp_path / "out", {})
    copy_companions(model, out)
    found = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert found == {*TAKEN, "additional_chat_templates/tool_use.jinja"}


def test_code_comes_along_where_a_config_refers_to_it(tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        model = directory_of(
            tmp_path / name, ["config.json", "modeling_own.py", "layers_own.py", "README.md"]
        )
        (model / name).write_text(
            json.dumps({"auto_map": {"AutoModelForCausalLM": "modeling_own.Model"}})
        )
        out = write_model(tmp_path / f"out {name}", {})
        copy_companions(model, out)
        assert {"modeling_own.py", "layers_own.py"} < set(
            os.listdir(out)
        ) and "README.md" not in os.listdir(out)


def test_companions_that_cannot_be_copied_are_named_before_any_is(tmp_path):
    for number, make in enumerate((os.mkfifo, lambda path: os.symlink("nowhere", path))):
        model = directory_of(tmp_path / str(number), ["added_tokens.json"], {})
        make(model / "tokenizer.json")
        out = write_model(tmp_path / f"out{number}", {})
        with pytest.raises(
            InputError,
            match="tokenizer.json: (must be a regular file|cannot be read: No such file)",
        ):
            copy_companions(model, out)
        assert not os.listdir(out)
    (tmp_path / "2" / "config.json").mkdir(parents=True)
    with pytest.raises(InputError, match="config.json: must be a regular file"):
        copy_companions(tmp_path / "2", out)


@pytest.mark.parametrize("mode", [0o022, 0o077])
def test_copies_honour_the_umask(tmp_path, mode):
    model = directory_of(tmp_path / "model", ["tokenizer.json"])
    (model / "tokenizer.json").chmod(0o400)
    out, old = write_model(tmp_path / "out", {}), os.umask(mode)
    try:
        copy_companions(model, out)
    finally:
        os.umask(old)
    assert (out / "tokenizer.json").stat().st_mode & 0o777 == 0o666 & ~mode


# ---- dtype
def test_the_dtypes_of_a_model_are_those_it_computes_in():
    tensors = [("F32", 10), ("BF16", 100), ("F8_E4M3", 10_000), ("I64", 5_000), ("F32", 5)]
    assert output_dtypes(tensors) == ("bfloat16", "float32")
    assert output_dtypes([("I32", 7)]) == ()


@pytest.mark.parametrize(
    "config,dtypes,truth",
    [
        ({"torch_dtype": "float32"}, ("bfloat16",), {"torch_dtype": "bfloat16"}),
        ({"dtype": None}, ("float16",), {"dtype": "float16"}),
        ({"dtype": "float32"}, ("bfloat16", "float32"), {"dtype": "bfloat16"}),
        ({"x": 1}, ("bfloat16",), {"x": 1}),
        ({"dtype": "float32"}, (), {"dtype": "float32"}),
        (
            {
                "dtype": "float32",
                "text_config": {"torch_dtype": "float32"},
                "vision_config": {"dtype": "float32"},
            },
            ("bfloat16", "float32"),
            {
                "dtype": "bfloat16",
                "text_config": {"torch_dtype": "bfloat16"},
                "vision_config": {"dtype": "float32"},
            },
        ),
        (
            {"vision_config": {"dtype": "float16"}},
            ("bfloat16",),
            {"vision_config": {"dtype": "bfloat16"}},
        ),
    ],
)
def test_config_says_the_tensors_dtype(tmp_path, config, dtypes, truth):
    model, out = directory_of(tmp_path / "model", [], config), write_model(tmp_path / "out", {})
    copy_companions(model, out, dtypes)
    assert config_of(out) == truth
    if config == truth:
        assert (out / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_what_is_no_longer_quantised_no_longer_says_so(tmp_path):
    fp8 = {"quantization_config": {"quant_method": "fp8", "dtype": "x"}}
    config = {
        **fp8,
        "dtype": "bfloat16",
        "time_step_limit": [0, float("inf")],
        "text_config": fp8,
        "name": "\ud800",
    }
    model = directory_of(tmp_path / "model", [], config)
    for number, (dequantized, left) in enumerate(((False, fp8), (True, {}))):
        out = write_model(tmp_path / f"out{number}", {})
        copy_companions(model, out, ("float16",), dequantized=dequantized)
        rest = {key: config[key] for key in ("time_step_limit", "name")}
        assert config_of(out) == {**left, **rest, "dtype": "float16", "text_config": left}


# ---- models whose configs do not fit
def models(tmp_path, *configs, tensors=None):
    result = []
    for number, config in enumerate(configs):
        content = one_tensor() if tensors is None else tensors[number]
        model = write_model(tmp_path / str(number), {"model.safetensors": content})
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            (model / "config.json").write_text(text)
        result.append(read_checkpoint(model))
    return result


@pytest.mark.parametrize(
    "first,second,message",
    [
        (
            {"vocab_size": 400},
            {"vocab_size": 408},
            "1/config.json: vocab_size: must be 400 as in .*0, got 408",
        ),
        (
            {"hidden_size": 8},
            {"text_config": {"hidden_size": 9}},
            "hidden_size: must be 8 .* got 9",
        ),
        (
            {"num_hidden_layers": 2},
            {"num_hidden_layers": 3},
            "num_hidden_layers: must be 2 .* got 3",
        ),
        (
            {"model_type": "llama"},
            {"model_type": "qwen2"},
            "model_type: must be 'llama' .* got 'qwen2'",
        ),
        (
            {"num_attention_heads": 4, "tie_word_embeddings": True},
            {"num_attention_heads": 8},
            "num_attention_heads: must be 4",
        ),
        (
            {"tie_word_embeddings": True},
            {"tie_word_embeddings": False},
            "tie_word_embeddings: must be True .* False",
        ),
        (
            {"text_config": {"tie_word_embeddings": True}},
            {"tie_word_embeddings": False},
            "tie_word_embeddings: must",
        ),
        ({}, "{oops", "1/config.json: is not JSON"),
        ({}, "[]", "1/config.json: must be a JSON object"),
        (
            {},
            {"quantization_config": {"quant_method": "gptq"}},
            "quant_method must be fp8 or absent, got 'gptq'",
        ),
    ],
)
def test_configs_that_differ_are_named_with_both_values(tmp_path, first, second, message):
    with pytest.raises(InputError, match=message):
        check_configs(models(tmp_path, first, second))


def test_configs_that_agree_or_do_not_say_pass(tmp_path):
    same = {
        "vocab_size": 4,
        "head_dim": None,
        "quantization_config": {"quant_method": "fp8"},
        "rope_theta": 1e4,
    }
    check_configs(
        models(
            tmp_path,
            same,
            {"text_config": {"vocab_size": 4, "head_dim": 8}},
            None,
            {"rope_theta": 2e4},
        )
    )


def head(*names, values=(bytes(8), bytes(8))):
    header = {name: tensor([2], 8 * number, 8 * number + 8) for number, name in enumerate(names)}
    return pack(header, b"".join(values)[: 8 * len(names)])


@pytest.mark.parametrize("order", [1, -1])
def test_tied_against_untied_is_refused_whatever_the_configs_say(tmp_path, order):
    tensors = [
        head("model.embed_tokens.weight"),
        head("model.embed_tokens.weight", "lm_head.weight"),
    ][::order]
    with pytest.raises(
        InputError, match="lm_head.weight: is missing, .* has it: a tied head cannot be merged"
    ):
        check_configs(models(tmp_path, {}, {}, tensors=tensors))


@pytest.mark.parametrize(
    "config", [{"tie_word_embeddings": True}, {}, {"text_config": {"tie_word_embeddings": True}}]
)
def test_a_head_of_its_own_is_said_to_be_untied(tmp_path, config):
    names = ("model.embed_tokens.weight", "lm_head.weight")
    contents = [head(*names), head(*names, values=(bytes(8), bytes(7) + b"x"))]
    same, different = models(tmp_path, config, config, tensors=contents)
    assert (
        not untie_if_different(same.path, *find_head(same.tensors))
        and config_of(same.path) == config
    )
    assert untie_if_different(different.path, *find_head(different.tensors))
    changed = config_of(different.path)
    assert changed["tie_word_embeddings"] is False
    assert all(
        part["tie_word_embeddings"] is False for part in changed.values() if isinstance(part, dict)
    )


def test_a_model_is_tied_by_its_config_and_without_a_head(tmp_path):
    tied, both = [head("wte.weight"), head("wte.weight", "lm_head.weight")]
    true, false = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
    found = models(tmp_path, true, true, false, {}, None, tensors=[tied, both, tied, tied, tied])
    assert [is_tied(one) for one in found] == [True, False, False, False, False]
    assert find_head(found[0].tensors) is None
