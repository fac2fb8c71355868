"""Quantised checkpoints that are not understood end a merge before it writes."""

import json

import numpy as np
import pytest
import torch
from support.merge.formats.quantised import Stored, finite_codes, integer_model, write_model
from support.merge.merges import load, write

from merit_fast.errors import InputError
from merit_fast.merge import merge_models

RNG = np.random.default_rng(1)
CODES = finite_codes(RNG, (6, 10)).view(torch.float8_e4m3fn)
FP8 = {"quant_method": "fp8"}


def model(tensors, config=None):
    return Stored({"l.weight": CODES} | tensors, {}, FP8 | (config or {}))


def integers(**changes):
    """A packed INT4 model; ``changes`` replace stored tensors, None removes one."""
    stored = integer_model(RNG, 5, 64, 4, 16, zero=True, order=True)
    for name, tensor in changes.items():
        stored.tensors.pop(f"l.{name}")
        if tensor is not None:
            stored.tensors[f"l.{name}"] = tensor
    return stored


def method(name):
    return Stored({"l.weight": torch.ones(2, 2)}, {}, {"quant_method": name})


CASES = {
    "no scale": (model({}), "l.weight: is F8_E4M3 and has no scale next to it; .*unscaled_fp8"),
    "a scale of another tensor": (
        model({"m.weight_scale": torch.tensor(1.0)}, {"quant_method": "modelopt"}),
        "l.weight: is F8_E4M3 and has no scale",
    ),
    "a scale that nobody uses": (
        model(
            {"l.weight_scale": torch.tensor(1.0), "m.weight_scale": torch.tensor(1.0)}
            | {"m.weight": torch.ones(2, 2)}
        ),
        "m.weight_scale: is part of a quantised tensor that is not there; m.weight is F32",
    ),
    "an E8M0 scale that nobody uses": (
        Stored(
            {"l.weight": torch.ones(2, 2)}
            | {"l.s": torch.zeros(2, 2, dtype=torch.uint8).view(torch.float8_e8m0fnu)},
            {},
        ),
        "l.s: is part of a quantised tensor",
    ),
    "two scales": (
        model({"l.weight_scale": torch.tensor(1.0), "l.scale": torch.tensor(1.0)}),
        "l.scale: is a second scale of l.weight, next to l.weight_scale",
    ),
    "a scale of the input that changes weights": (
        model({"l.weight_scale": torch.tensor(1.0), "l.pre_quant_scale": torch.ones(10)}),
        "l.pre_quant_scale: is part of a quantised tensor",
    ),
    "blocks that may be two": (
        Stored(
            {
                "l.weight": finite_codes(RNG, (192, 6)).view(torch.float8_e4m3fn),
                "l.weight_scale": torch.ones(2, 1),
            },
            {},
        ),
        r"may have blocks of \[96, 6\] or \[128, 128\]: weight_block_size",
    ),
    "a plain model that says fp8": (method("fp8"), "is of fp8, but no tensor is quantised"),
    **{
        name: (method(name), f"quant_method must be one of .*, got '{name}'")
        for name in ("gptq", "awq", "bitsandbytes", "hqq", "torchao", "quanto", "aqlm", "new")
    },
    "GPTQ by names": (
        Stored({"l.qweight": torch.zeros(2, 2, dtype=torch.int32)}, {}),
        "l.qweight: is of GPTQ or AWQ, which is not read",
    ),
    "bitsandbytes by names": (
        Stored(
            {"l.weight": torch.zeros(8, 1, dtype=torch.uint8)} | {"l.weight.absmax": torch.ones(2)},
            {},
        ),
        "l.weight.absmax: is of bitsandbytes",
    ),
    "gpt-oss without scales": (
        Stored({"l.down_proj_blocks": torch.zeros(2, 6, 1, 16, dtype=torch.uint8)}, {}),
        "l.down_proj_blocks: is part of a quantised tensor that is not there",
    ),
    "a rotated basis": (
        model(
            {"l.weight_scale": torch.tensor(1.0)},
            {
                "quant_method": "compressed-tensors",
                "transform_config": {"config_groups": {"R1": {}}},
            },
        ),
        "transform_config: must be absent",
    ),
    "words without their shape": (
        integers(weight_shape=None),
        "l.weight_packed: needs l.weight_shape of two integers",
    ),
    "words of another width": (
        integers(weight_packed=torch.zeros(5, 7, dtype=torch.int32)),
        r"must hold 5 x 64 integers of the num_bits in config.json \[4\], got \[5, 7\] words",
    ),
    "zero points of another shape": (
        integers(weight_zero_point=torch.zeros(2, 4, dtype=torch.int32)),
        r"must be zero points of l.weight, I32 \[1, 4\], got I32 \[2, 4\]",
    ),
    "an order that leads out": (
        integers(weight_g_idx=torch.full((64,), 4, dtype=torch.int32)),
        "l.weight_g_idx: must be 64 numbers below 4, got 4",
    ),
    "a method that is no word": (
        Stored({"l.weight": torch.ones(2, 2)}, {}, {"quant_method": ["fp8"]}),
        "quant_method must be one of",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"method": "passthrough", "dtype": "bf16"}])
def test_the_message_names_the_tensor_and_nothing_is_written(tmp_path, case, options):
    stored, message = CASES[case]
    path = write_model(tmp_path / "model", stored)
    with pytest.raises(InputError, match=message) as caught:
        merge_models([path], out=tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model"]


def test_the_option_takes_codes_without_a_scale_as_values(tmp_path):
    path = write_model(tmp_path / "model", model({}))
    merge_models([path], out=tmp_path / "out", dtype="fp32", unscaled_fp8=True)
    assert torch.equal(load(tmp_path / "out")["l.weight"], CODES.float())


def test_an_unscaled_base_is_refused_under_an_adapter(tmp_path):
    base = write_model(tmp_path / "base", model({}), model_type="llama")
    adapter = write(
        tmp_path / "adapter",
        {
            "base_model.model.l.lora_A.weight": torch.ones(2, 10),
            "base_model.model.l.lora_B.weight": torch.ones(6, 2),
        },
        "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["l"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="l.weight: is F8_E4M3 and has no scale"):
        merge_models([adapter], base=base, out=tmp_path / "out", dtype="bf16")


def test_a_parameter_named_scale_is_no_scale_of_codes(tmp_path):
    """Models have parameters of such names: Inkling's q_l2_clip.scale, Gemma's per_dim_scale."""
    stored = model({"l.weight_scale": torch.tensor(2.0)})
    stored.tensors |= {"q_l2_clip.scale": torch.ones(3), "attn.per_dim_scale": torch.ones(2)}
    path = write_model(tmp_path / "model", stored)
    merge_models([path], out=tmp_path / "out", dtype="fp32")
    merged = load(tmp_path / "out")
    assert merged.keys() == {"l.weight", "q_l2_clip.scale", "attn.per_dim_scale"}
