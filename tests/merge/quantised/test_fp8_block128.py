"""dtype fp8-block128: any inputs become an fp8 model that transformers loads."""

import json
import shutil

import numpy as np
import pytest
import torch
from support.merge.formats.cases import CASES, fp8_model, uniform
from support.merge.formats.quantised import write_model
from support.merge.merges import load, write
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from merit_fast.errors import InputError
from merit_fast.merge import load_merged, merge_models, merge_state_dicts
from merit_fast.merge.write import shards

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
}


def llama(path, seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES, intermediate_size=256, tie_word_embeddings=False, **options)
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


def dequantised(tensors, name):
    """The values of a weight in blocks of 128 x 128."""
    scale = tensors[f"{name}_scale_inv"].double()
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return tensors[name].double() * wide


def linears(tensors):
    return {name.removesuffix("_scale_inv") for name in tensors if name.endswith("_scale_inv")}


def check_loaded(out, plain):
    """transformers loads the output; its values are the plain merge's, rounded to codes."""
    loaded = AutoModelForCausalLM.from_pretrained(out)
    wanted = AutoModelForCausalLM.from_pretrained(plain)
    for (name, ours), theirs in zip(loaded.named_parameters(), wanted.parameters(), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == torch.bfloat16
        assert torch.allclose(ours, theirs, rtol=1 / 14, atol=1e-3), name
    tokens = torch.arange(12)[None]
    difference = (loaded(tokens).logits - wanted(tokens).logits).norm()
    assert difference < 0.1 * wanted(tokens).logits.norm()
    return loaded


def test_plain_models_become_a_model_that_transformers_loads(tmp_path):
    models = [llama(tmp_path / name, seed) for seed, name in enumerate("ab")]
    summary = merge_models(models, [0.3, 0.7], out=tmp_path / "out", dtype="fp8-block128")
    merge_models(models, [0.3, 0.7], out=tmp_path / "plain")
    tensors = load(tmp_path / "out")
    first, second = (load(model) for model in models)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    kept = config.pop("modules_to_not_convert")
    assert config == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    # 64 rows of keys and values are no whole block
    assert {"lm_head", "model.embed_tokens", "model.layers.0.self_attn.k_proj"} <= {*kept}
    assert len(linears(tensors)) == 2 * 5
    squares = 0.0
    for name in linears(tensors):
        exact = 0.3 * first[name].double() + 0.7 * second[name].double()
        assert name.removesuffix(".weight") not in kept
        error = dequantised(tensors, name) - exact
        largest = exact.abs().reshape(-1, 128, exact.shape[1] // 128, 128).amax((1, 3))
        scale = tensors[f"{name}_scale_inv"]
        assert torch.equal(scale, (largest / 448).float())
        bound = torch.maximum(exact.abs() / 16, largest.amax() / 448 / 1024)
        assert (error.abs() <= bound * (1 + 1e-9)).all()
        squares += float(error.square().sum())
    elements = sum(tensors[name].numel() for name in linears(tensors))
    rounding = summary["rounding"]
    assert rounding["elements"] == elements
    np.testing.assert_allclose(rounding["rms_error"], (squares / elements) ** 0.5, rtol=1e-9)
    assert 0.01 < rounding["relative_rms_error"] < 0.05
    assert summary["dtype"] == "F8_E4M3 with scales, bf16"
    check_loaded(tmp_path / "out", tmp_path / "plain")


def test_the_output_is_an_input_of_the_next_merge(tmp_path):
    models = [llama(tmp_path / name, seed) for seed, name in enumerate("ab")]
    merge_models(models, out=tmp_path / "fp8", dtype="fp8-block128")
    shutil.copytree(tmp_path / "fp8", tmp_path / "copy")
    merge_models([tmp_path / "fp8", tmp_path / "copy"], out=tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "fp8/model.safetensors"
    ).read_bytes()
    loaded = load_merged([tmp_path / "fp8"], dtype="fp32").state_dict()
    tensors = load(tmp_path / "fp8")
    for name in linears(tensors):
        assert torch.equal(loaded[name], dequantised(tensors, name).float())


@pytest.mark.parametrize("width,quantised", [(128, True), (64, False)])
def test_experts_are_quantised_all_or_none(tmp_path, width, quantised):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SIZES,
        intermediate_size=128,
        moe_intermediate_size=width,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "m")
    merge_models([tmp_path / "m"], out=tmp_path / "out", dtype="fp8-block128")
    merge_models([tmp_path / "m"], out=tmp_path / "plain")
    names = {name for name in linears(load(tmp_path / "out")) if ".experts." in name}
    assert len(names) == (2 * 4 * 3 if quantised else 0)
    check_loaded(tmp_path / "out", tmp_path / "plain")


def test_the_first_models_linears_are_quantised_again(tmp_path):
    """From any format: here rows with one scale each, and integers of 4 bits."""
    stored = fp8_model((128, 256), uniform(128, 1), (1, 256), "l.weight_scale")
    stored.tensors["m.weight"] = torch.randn(128, 128).bfloat16()
    models = [write_model(tmp_path / name, stored, x=1) for name in "ab"]
    merge_models(models, out=tmp_path / "out", dtype="fp8-block128")
    tensors = load(tmp_path / "out")
    assert linears(tensors) == {"l.weight"} and "l.weight_scale" not in tensors
    values = dequantised(tensors, "l.weight").numpy()
    np.testing.assert_allclose(values, stored.values["l.weight"], rtol=1 / 16, atol=1e-3)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["lm_head", "m"]


def test_scales_are_powers_of_two_where_the_input_has_such(tmp_path):
    scale = torch.randint(118, 134, (256, 4), dtype=torch.uint8)
    stored = fp8_model((256, 128), scale, (1, 32), "l.weight_scale_inv")
    stored.config = {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
    model = write_model(tmp_path / "m", stored)
    merge_models([model], out=tmp_path / "out", dtype="fp8-block128")
    tensors = load(tmp_path / "out")
    assert tensors["l.weight_scale_inv"].dtype == torch.float8_e8m0fnu
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["scale_fmt"] == "ue8m0"
    values = dequantised(tensors, "l.weight").numpy()
    largest = np.abs(stored.values["l.weight"]).reshape(2, 128, 1, 128).max((1, 3))
    bound = np.repeat(largest / 448 * 2 / 1024, 128, 0)
    error = np.abs(values - stored.values["l.weight"])
    assert (error <= np.maximum(np.abs(stored.values["l.weight"]) / 16, bound)).all()


def test_shares_give_the_same_bytes_and_errors(tmp_path):
    models = [llama(tmp_path / name, seed) for seed, name in enumerate("ab")]
    options = {"dtype": "fp8-block128", "shard_size": "200K"}
    whole = merge_models(models, out=tmp_path / "whole", **options)
    for number in (1, 2):
        part = merge_models(models, out=tmp_path / "parts", share=(number, 2), **options)
    assert part["rounding"] == whole["rounding"]
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "parts").iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 2
    for name in names:
        if name.endswith((".safetensors", "index.json", "rounding.json", "config.json")):
            assert (tmp_path / "whole" / name).read_bytes() == (
                tmp_path / "parts" / name
            ).read_bytes()


def test_nonfinite_values_become_nan_where_they_are_allowed(tmp_path):
    tensor = torch.randn(128, 128)
    tensor[3, 4] = float("inf")
    tensor[5, 6] = float("nan")
    model = write(tmp_path / "m", {"l.q_proj.weight": tensor})
    with pytest.raises(InputError, match="must be finite"):
        merge_models([model], out=tmp_path / "bad", dtype="fp8-block128")
    merge_models([model], out=tmp_path / "out", dtype="fp8-block128", allow_nonfinite=True)
    values = dequantised(load(tmp_path / "out"), "l.q_proj.weight")
    assert values.isnan().nonzero().tolist() == [[3, 4], [5, 6]]


def test_disk_and_memory_of_the_encoder_are_counted_before_anything_is_written(
    tmp_path, monkeypatch
):
    models = [llama(tmp_path / name, seed) for seed, name in enumerate("ab")]
    options = {"out": tmp_path / "out", "dtype": "fp8-block128", "threads": 2}
    plan = merge_models(models, dry_run=True, **options)
    largest = 256 * 128  # elements of a projection of the MLP
    assert plan["buffer_bytes"] >= 2 * largest * 9
    with pytest.raises(InputError, match="max_memory: must be at least [0-9]+ bytes"):
        merge_models(models, max_memory="100K", **options)
    monkeypatch.setattr(shards, "free_bytes", lambda path: plan["bytes_out"] + largest)
    with pytest.raises(InputError, match=f"needs {plan['bytes_out'] + 8 * largest} bytes"):
        merge_models(models, **options)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shards, "free_bytes", lambda path: plan["bytes_out"] + 8 * largest)
    merge_models(models, **options)


def test_a_model_without_such_layers_is_refused(tmp_path):
    model = write(tmp_path / "m", {"l.q_proj.weight": torch.randn(64, 128)})
    with pytest.raises(InputError, match="holds no linear layer whose rows and columns"):
        merge_models([model], out=tmp_path / "out", dtype="fp8-block128")


def test_memory_holds_no_quantised_models(tmp_path):
    with pytest.raises(InputError, match="load_merged: dtype: fp8-block128 concerns"):
        load_merged([tmp_path], dtype="fp8-block128")
    with pytest.raises(InputError, match="merge_state_dicts: dtype: fp8-block128 concerns"):
        merge_state_dicts([{"w": torch.ones(2)}], dtype="fp8-block128")
    model = write_model(tmp_path / "m", CASES["V3 blocks, cut"])
    with pytest.raises(InputError, match="l.weight: is F8_E4M3; dtype= must choose"):
        load_merged([model])
