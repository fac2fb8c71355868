"""The base's dtype is no rule for the output: models give it, and the base is read as it is."""

import json

import pytest
import torch
from support.merge.merges import METHODS, config_of, load, merge, write
from support.tiny import make_model

from merit_fast.errors import InputError
from merit_fast.evaluate.config import EvaluateConfig
from merit_fast.merge import load_merged, merge_models
from merit_fast.options.parser import parse
from merit_fast.sketch.config import SketchConfig
from merit_fast.train.config import TrainConfig

WITH_BASE = [each for each in METHODS if each["method"] not in ("slerp",)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two bf16 models and their base in fp32, with values that bf16 cannot hold."""
    root = tmp_path_factory.mktemp("dtypes")
    base = make_model(root / "base", seed=1, shard="1GB")
    branches = []
    for k in range(2):
        make_model(root / f"b{k}", seed=2 + k, dtype=torch.bfloat16, shard="1GB")
        branches.append(root / f"b{k}")
    assert base.dtype == torch.float32
    return branches, root / "base"


@pytest.mark.parametrize("options", WITH_BASE, ids=lambda each: each["method"])
def test_every_method_takes_an_fp32_base_for_bf16_models(models, tmp_path, options):
    branches, base = models
    merge(branches, [0.5, 0.5], tmp_path / "out", config_of(options), base)
    merge(branches, [0.5, 0.5], tmp_path / "asked", config_of({**options, "dtype": "bf16"}), base)
    merge(branches, [0.5, 0.5], tmp_path / "wide", config_of({**options, "dtype": "fp32"}), base)
    merged = load(tmp_path / "out")
    wide = load(tmp_path / "wide")
    for name, tensor in load(tmp_path / "asked").items():
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name], tensor), name
        assert torch.allclose(tensor.float(), wide[name], rtol=2**-8, atol=0), name  # one rounding
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_a_step_of_nothing_is_the_base_rounded_once(models, tmp_path):
    branches, base = models
    merge(branches, [0.5, 0.5], tmp_path / "out", config_of({"scale": 0.0}), base)
    start = load(base)
    for name, tensor in load(tmp_path / "out").items():
        assert torch.equal(tensor, start[name].bfloat16()), name


def test_load_merged_takes_an_fp32_base_too(models, tmp_path):
    branches, base = models
    loaded = load_merged(branches, "uniform", base=base, method="ties", density=0.2)
    summary = merge_models(branches, base=base, out=tmp_path / "o", method="ties", density=0.2)
    expected = load(tmp_path / "o")
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        if name in expected:
            assert torch.equal(tensor, expected[name]), name
    assert summary["dtype"] == "bf16"
    assert summary["dtype_reason"] == "the models' own; the base is fp32 and is read as it is"


def test_stats_and_missing_tensors_use_the_base_as_it_is(models, tmp_path):
    branches, base = models
    merge_models(branches, base=base, out=tmp_path / "o", stats=True)
    geometry = json.loads((tmp_path / "o/geometry.json").read_text())
    moved = [load(branch) for branch in branches]
    start = load(base)
    squared = sum(
        float(((moved[0][name].double() - start[name].double()) ** 2).sum()) for name in start
    )
    assert geometry["norms"][0] == pytest.approx(squared**0.5, rel=1e-9)

    tensors = {"a": torch.randn(3, 4), "b": torch.randn(3, 4), "c": torch.randn(2)}
    small = write(tmp_path / "base", tensors)
    first = write(tmp_path / "m0", {"a": tensors["a"].bfloat16() + 1})
    second = write(tmp_path / "m1", {"b": tensors["b"].bfloat16() + 1})
    merge([first, second], [0.5, 0.5], tmp_path / "gaps", config_of({"missing": "base"}), small)
    merged = load(tmp_path / "gaps")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    half = (tensors["a"].bfloat16() + 1).double() * 0.5 + 0.5 * tensors["a"].double()
    assert torch.equal(merged["a"], half.bfloat16())
    assert torch.equal(merged["c"], tensors["c"].bfloat16())  # the base lends it to all models


def test_models_that_differ_need_a_dtype_named_as_the_caller_types_it(models, tmp_path, call):
    branches, base = models
    mixed = [branches[0], base]
    with pytest.raises(InputError, match="dtype must be BF16 .* got F32; dtype= chooses one$"):
        merge_models(mixed, out=tmp_path / "o")
    with pytest.raises(InputError, match="dtype must be BF16 .* got F32; merge.dtype chooses one$"):
        merge(mixed, [0.5, 0.5], tmp_path / "yaml")
    flags = [word for model in mixed for word in ("--model", model)]
    code, _, err = call("merge", tmp_path / "o", *flags)
    assert code == 2 and err.rstrip().endswith("got F32; --dtype chooses one")
    code, out, err = call("merge", tmp_path / "o", *flags, "--dtype", "bfloat16")
    assert code == 0 and "dtype: bf16, as asked for" in out, err


@pytest.mark.parametrize("cls", [SketchConfig, TrainConfig, EvaluateConfig])
def test_every_dtype_key_takes_torchs_names(cls):
    assert parse(cls, {"dtype": "bfloat16"}, "f.yml").dtype == "bf16"
    assert parse(cls, {"dtype": "float32"}, "f.yml").dtype == "fp32"
    with pytest.raises(InputError, match="dtype: must be one of auto, bf16, fp32"):
        parse(cls, {"dtype": "float16"}, "f.yml")
    assert config_of({"dtype": "float16"}).dtype == "fp16"
