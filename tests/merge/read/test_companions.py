"""Files next to the weights: which are copied, and the dtypes in config.json."""

import json
import os

import pytest
from support.headers import write_model
from support.merge.configs import config_of

from merit_fast.errors import InputError
from merit_fast.merge.read.companions import (
    copy_companions,
    output_dtypes,
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


def test_all_that_a_model_needs_comes_along_and_nothing_else(tmp_path):
    model = directory_of(tmp_path / "model", TAKEN | LEFT)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ x }}")
    (model / "tokenizer").mkdir()
    out = write_model(tmp_path / "out", {})
    copy_companions(model, out)
    copied = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert copied == {*TAKEN, "additional_chat_templates/tool_use.jinja"}


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
    out = write_model(tmp_path / "out", {})
    old = os.umask(mode)
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
    model = directory_of(tmp_path / "model", [], config)
    out = write_model(tmp_path / "out", {})
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
