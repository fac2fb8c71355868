"""Quantised outputs: the inputs' own form, untouched tensors byte for byte, and fp8-block128."""

import json

import numpy as np
import pytest
import torch
from support.merge.formats.cases import CASES, fp8_model, uniform
from support.merge.formats.quantised import Stored, nvfp4_model, powers, spread, write_model
from support.merge.formulas import delta_method
from support.merge.merges import bits, load, write

from merit_fast.errors import InputError
from merit_fast.merge import merge_models

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E5M2 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).double()


def check_codes(codes, scale, block, exact):
    """Scales are the block's largest value / 448, and every code is a nearest one."""
    kinds = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
    values = kinds[codes.dtype].numpy()
    finite = values[np.isfinite(values)]
    grid = powers(scale.numpy()) if scale.dtype == torch.uint8 else scale.double().numpy()
    rows, columns = exact.shape[-2:]
    grid = grid.reshape(*exact.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    padded = np.zeros((*grid.shape[:-2], grid.shape[-2] * block[0], grid.shape[-1] * block[1]))
    padded[..., :rows, :columns] = np.abs(exact)
    shape = (*grid.shape[:-2], grid.shape[-2], block[0], grid.shape[-1], block[1])
    wanted = padded.reshape(shape).max(axis=(-3, -1)) / finite.max()
    if scale.dtype == torch.uint8:  # the next power of two
        assert (grid >= wanted).all() and (grid < 2 * wanted).all()
    elif scale.dtype == torch.float32:
        np.testing.assert_array_equal(grid, wanted.astype(np.float32))
    else:
        assert (grid >= wanted).all()
        np.testing.assert_allclose(grid, wanted, rtol=2**-7)
    wide = spread(grid, block, exact.shape)
    error = np.abs(codes.double().numpy() * wide - exact)
    nearest = np.abs(finite * wide[..., None] - exact[..., None]).min(-1)
    np.testing.assert_allclose(error, nearest, rtol=0, atol=1e-15)
    return error


SAME = {  # case -> block
    "V3 blocks, cut": (4, 6),
    "V4 .scale, E8M0 dtype": (4, 6),
    ".scale_inv in bf16": (4, 6),
    "Mistral, per tensor": (3, 5),
    "FBGEMM rows": (1, 4),
    "MXFP8 bytes": (1, 32),
    "experts in cut blocks": (4, 6),
    "one scale an expert": (10, 15),
    "torch.float8_e5m2": (4, 6),
}


def pair(tmp_path, case):
    """Two models of one form, and the exact values of each."""
    first = CASES[case]
    codes, scale = first.tensors.values()
    other_scale = scale.flip(0) if scale.ndim else scale * 1.5
    block = SAME[case]
    names = list(first.tensors)
    second = fp8_model(
        tuple(codes.shape), other_scale, block, names[1], first.config, codes.dtype, names[0]
    )
    models = [
        write_model(tmp_path / name, stored, {"norm.weight": torch.ones(3).bfloat16()})
        for name, stored in (("a", first), ("b", second))
    ]
    return models, [stored.values[names[0]] for stored in (first, second)], names, block


@pytest.mark.parametrize("case", SAME)
def test_without_a_dtype_the_output_has_the_inputs_form_with_fresh_scales(tmp_path, case, backend):
    models, exact, (name, scale_name), block = pair(tmp_path, case)
    summary = merge_models(models, [0.3, 0.7], out=tmp_path / "out")
    merged = load(tmp_path / "out")
    stored = load(models[0])
    assert {key: (t.dtype, t.shape) for key, t in merged.items()} == {
        key: (t.dtype, t.shape) for key, t in stored.items()
    }
    value = 0.3 * exact[0] + 0.7 * exact[1]
    error = check_codes(merged[name], merged[scale_name], block, value)
    assert (tmp_path / "out/config.json").read_text() == (models[0] / "config.json").read_text()
    rounding = summary["rounding"]
    assert rounding["elements"] == value.size
    np.testing.assert_allclose(rounding["largest_error"], error.max(), rtol=1e-12)
    np.testing.assert_allclose(rounding["rms_error"], np.sqrt((error**2).mean()), rtol=1e-9)
    share = np.sqrt((error**2).sum() / (value**2).sum())
    np.testing.assert_allclose(rounding["relative_rms_error"], share, rtol=1e-9)
    assert f"largest error {error.max():.3g}" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"method": "passthrough"}])
def test_one_model_passes_byte_for_byte(tmp_path, case, options):
    norm = {"norm.weight": torch.ones(3).bfloat16()}
    model = write_model(tmp_path / "m", CASES[case], norm, model_type="llama")
    merge_models([model], out=tmp_path / "out", **options)
    merged = load(tmp_path / "out")
    stored = load(model)
    assert merged.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(bits(merged[name]), bits(tensor), name)
        assert merged[name].shape == tensor.shape and merged[name].dtype == tensor.dtype
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (model / "config.json").read_text()
    )


def test_modelopts_own_config_comes_along(tmp_path):
    stored = nvfp4_model(np.random.default_rng(1), 5, 48, "modelopt")
    model = write_model(tmp_path / "m", Stored(stored.tensors, stored.values))
    config = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (model / "hf_quant_config.json").write_text(json.dumps(config))
    merge_models([model], out=tmp_path / "same")
    assert json.loads((tmp_path / "same/hf_quant_config.json").read_text()) == config
    merge_models([model], out=tmp_path / "plain", dtype="bf16")
    assert not (tmp_path / "plain/hf_quant_config.json").exists()


def lora(path, module, rows, columns):
    write(
        path,
        {
            f"base_model.model.{module}.lora_A.weight": torch.randn(2, columns),
            f"base_model.model.{module}.lora_B.weight": torch.randn(rows, 2),
        },
        "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("method", [{}, {"method": "ties", "density": 0.5}])
def test_an_adapter_leaves_tensors_it_does_not_touch_byte_for_byte(tmp_path, method):
    """gpt-oss cannot be written with new values, but attention is not quantised in it."""
    base = write_model(
        tmp_path / "base", CASES["gpt-oss"], {"l.q_proj.weight": torch.randn(4, 6).bfloat16()}
    )
    adapters = [lora(tmp_path / f"adapter{k}", "l.q_proj", 4, 6) for k in range(2)]
    merge_models(adapters, [0.5, 0.5], base=base, out=tmp_path / "out", **method)
    before = load(base)
    after = load(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["l.q_proj.weight"]


def test_an_adapter_on_fp8_gives_fp8(tmp_path):
    stored = CASES["V3 blocks, cut"]
    base = write_model(tmp_path / "base", stored)
    adapter = lora(tmp_path / "adapter", "l", 10, 15)
    merge_models([adapter], base=base, out=tmp_path / "out")
    factors = {name[-13:]: t for name, t in load(adapter).items()}
    change = factors["lora_B.weight"].double() @ factors["lora_A.weight"].double()
    merged = load(tmp_path / "out")
    value = stored.values["l.weight"] + change.numpy()
    check_codes(merged["l.weight"], merged["l.weight_scale_inv"], (4, 6), value)


def test_methods_on_deltas_write_codes(tmp_path, backend):
    models, exact, (name, scale_name), block = pair(tmp_path, "V3 blocks, cut")
    base = write(
        tmp_path / "base", {name: torch.randn(exact[0].shape), "norm.weight": torch.ones(3)}
    )
    options = {"method": "ties", "density": 0.6}
    merge_models(models, [0.5, 0.5], base=base, out=tmp_path / "out", **options)
    merged = load(tmp_path / "out")
    branches = [torch.from_numpy(value) for value in exact]
    truth = delta_method("ties", name, branches, load(base)[name], [0.5, 0.5], density=0.6)
    check_codes(merged[name], merged[scale_name], block, np.asarray(truth).reshape(exact[0].shape))


@pytest.mark.parametrize(
    "case", ["gpt-oss", "int4, ordered columns", "NVFP4, ModelOpt", "int8", "torch.float8_e4m3fnuz"]
)
def test_a_form_that_cannot_be_written_asks_for_a_dtype(tmp_path, case):
    models = [write_model(tmp_path / name, CASES[case]) for name in ("a", "b")]
    with pytest.raises(InputError, match="which cannot be written with new values; dtype= must"):
        merge_models(models, out=tmp_path / "out")
    merge_models(models, out=tmp_path / "out", dtype="bf16")
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()


def test_quantised_and_plain_models_ask_for_a_dtype(tmp_path):
    a = write_model(tmp_path / "a", CASES["V3 blocks, cut"])
    b = write(tmp_path / "b", {"l.weight": torch.randn(10, 15).bfloat16()})
    with pytest.raises(InputError, match="l.weight: is F8_E4M3, BF16 in .*; dtype= chooses one"):
        merge_models([a, b], out=tmp_path / "out")


def test_scales_of_inputs_cannot_be_kept_for_new_weights(tmp_path):
    stored = fp8_model((4, 6), uniform(), (4, 6), "l.weight_scale")
    stored.tensors["l.input_scale"] = torch.tensor(3.0)
    models = [write_model(tmp_path / name, stored) for name in ("a", "b")]
    with pytest.raises(InputError, match="is fp8 with .input_scale, which cannot be written"):
        merge_models(models, out=tmp_path / "out")


def test_a_cache_with_scales_asks_for_a_dtype(tmp_path):
    stored = fp8_model((4, 6), uniform(), (4, 6), "l.weight_scale", {"quant_method": "modelopt"})
    stored.config["kv_cache_scheme"] = {"num_bits": 8}
    model = write_model(tmp_path / "m", stored)
    with pytest.raises(InputError, match="kv_cache_scheme: scales of a cache are not written"):
        merge_models([model], out=tmp_path / "out")


@pytest.mark.parametrize("case", ["Mistral, per tensor", "experts in cut blocks", "FBGEMM rows"])
def test_slabs_of_a_few_rows_give_the_same_bytes(tmp_path, monkeypatch, case):
    """Blocks that are higher than a slab take a pass for their scales first."""
    models, _, _, _ = pair(tmp_path, case)
    whole = merge_models(models, out=tmp_path / "whole")
    monkeypatch.setattr("merit_fast.merge.engine.quantise.stream.SLAB_BYTES", 2 * 8 * 5)
    slabs = merge_models(models, out=tmp_path / "slabs", threads=3)
    for name, number in slabs["rounding"].items():
        np.testing.assert_allclose(number, whole["rounding"][name], rtol=1e-12)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (
        tmp_path / "slabs/model.safetensors"
    ).read_bytes()
