"""8-bit floats with scales are decoded while they are read."""

import json

import numpy as np
import pytest
import torch
from support.merge.formulas import delta_method, rounded
from support.merge.merges import bits, load, merge, write

from merit_fast.errors import InputError
from merit_fast.merge import MergeConfig
from merit_fast.merge.engine.decode import code_values

KINDS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


# ---- 8-bit floats
def by_hand(code, mantissa, bias, top):
    """The value of a code by the OCP specification, in Python."""
    sign = -1.0 if code & 128 else 1.0
    exponent = (code & 127) >> mantissa
    fraction = code & ((1 << mantissa) - 1)
    if (code & 127) in top:
        return sign * top[code & 127]
    if exponent == 0:
        return sign * fraction / 2**mantissa * 2.0 ** (1 - bias)
    return sign * (1 + fraction / 2**mantissa) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_has_its_value(kind):
    inf = float("inf")
    nan = float("nan")
    mantissa, bias, top = (
        (3, 7, {127: nan})
        if kind == "F8_E4M3"
        else (2, 15, {124: inf, 125: nan, 126: nan, 127: nan})
    )
    known = [by_hand(code, mantissa, bias, top) for code in range(256)]
    np.testing.assert_array_equal(code_values(kind), known)
    numbers = ~np.isnan(known)
    np.testing.assert_array_equal(
        np.signbit(code_values(kind))[numbers], np.signbit(known)[numbers]
    )
    codes = torch.arange(256, dtype=torch.uint8).view(KINDS[kind])
    np.testing.assert_array_equal(code_values(kind), codes.double().numpy())


def quantised(rows, cols, kind, scale=None, name="w_scale_inv", config=None, seed=0):
    """(tensors, config.json) of a model with an 8-bit tensor of all finite codes and a bf16 one."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 124, (rows, cols), generator=generator, dtype=torch.uint8)
    codes += 128 * torch.randint(0, 2, (rows, cols), generator=generator, dtype=torch.uint8)
    tensors = {"w": codes.view(KINDS[kind]), "v": torch.randn(7, generator=generator).bfloat16()}
    if scale is not None:
        tensors[name] = scale
    return tensors, config


def write_quantised(directory, tensors, config):
    write(directory, tensors)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def blocks(rows, cols, block):
    return torch.rand(-(-rows // block[0]), -(-cols // block[1])) + 0.1


FP8 = {"quant_method": "fp8"}


SCALES = {  # rows, cols, scale's shape, block, weight_block_size
    "none": (6, 10, None, None, None),
    "one": (6, 10, (), (6, 10), None),
    "one in a list": (6, 10, (1,), (6, 10), None),
    "one in a matrix": (6, 10, (1, 1), (6, 10), None),
    "per row": (6, 10, (6,), (1, 10), None),
    "per row, as a column": (6, 10, (6, 1), (1, 10), None),
    "blocks": (6, 10, (3, 2), (2, 5), None),
    "blocks as told": (256, 384, (2, 3), (128, 128), [128, 128]),
    "ragged blocks": (130, 70, (3, 2), (50, 64), [50, 64]),
    "a block above the shape": (6, 10, (1, 1), (128, 128), [128, 128]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SCALES)
def test_values_are_codes_times_scales(tmp_path, case, kind, backend):
    rows, cols, shape, block, told = SCALES[case]
    config = {
        "quantization_config": FP8 | ({"weight_block_size": told} if told else {}),
        "dtype": "bfloat16",
    }
    models = []
    exact = []
    for k, dtype in enumerate((torch.float32, torch.bfloat16)):  # of the scales
        torch.manual_seed(k)
        scale = None if shape is None else (torch.rand(shape) + 0.1).to(dtype)
        name = ("w_scale_inv", "w_scale")[k]
        tensors, _ = quantised(rows, cols, kind, scale, name, seed=k)
        models.append(write_quantised(tmp_path / f"m{k}", tensors, config))
        factors = np.ones((rows, cols))
        if scale is not None:
            grid = scale.double().numpy().reshape(-(-rows // block[0]), -(-cols // block[1]))
            factors = np.repeat(np.repeat(grid, block[0], 0), block[1], 1)[:rows, :cols]
        exact.append(tensors["w"].double().numpy() * factors)
    options = MergeConfig(dtype="fp32", chunk_kib=4, unscaled_fp8=case == "none")
    merge(models, [0.3, 0.7], tmp_path / "out", options)
    merged = load(tmp_path / "out")
    assert sorted(merged) == ["v", "w"]  # the scales are no tensors of the output
    np.testing.assert_array_equal(
        merged["w"].numpy(), (0.3 * exact[0] + 0.7 * exact[1]).astype(np.float32)
    )
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "dtype": "float32"
    }  # and no quantization_config


def test_scales_of_layers_input_go_too(tmp_path):
    tensors, _ = quantised(4, 4, "F8_E4M3")
    named = {
        "mlp.weight": tensors["w"],
        "mlp.weight_scale": torch.tensor(2.0),
        "mlp.input_scale": torch.tensor(3.0),
    }
    merge([write(tmp_path / "m", named)], [1.0], tmp_path / "out", MergeConfig(dtype="bf16"))
    merged = load(tmp_path / "out")
    assert list(merged) == ["mlp.weight"]
    assert torch.equal(merged["mlp.weight"], (tensors["w"].float() * 2).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_8_bit_and_wider_models_mix_in_every_method(tmp_path, kind, backend):
    tensors, _ = quantised(40, 30, kind, torch.rand(40) + 0.5)
    base = torch.randn(40, 30).bfloat16()
    other = torch.randn(40, 30)
    paths = [
        write(tmp_path / "m0", tensors | {"v": torch.zeros(7).bfloat16()}),
        write(tmp_path / "m1", {"w": other, "v": torch.zeros(7)}),
        write(tmp_path / "base", {"w": base, "v": torch.zeros(7).bfloat16()}),
    ]
    made = torch.from_numpy(
        tensors["w"].double().numpy() * tensors["w_scale_inv"].double().numpy()[:, None]
    )
    for method in ("ties", "dare_linear", "breadcrumbs", "della"):
        out = tmp_path / f"{method}-out"
        merge(
            paths[:2],
            [0.5, 0.5],
            out,
            MergeConfig(method=method, density=0.6, dtype="fp32", chunk_kib=4),
            paths[2],
        )
        truth = delta_method(method, "w", [made, other], base, [0.5, 0.5], density=0.6)
        np.testing.assert_array_equal(
            bits(load(out)["w"]), rounded(truth, torch.float32), err_msg=method
        )


def test_nan_codes_are_found_and_pass_if_allowed(tmp_path, backend):
    codes = torch.full((3, 5), 0x38, dtype=torch.uint8)  # 1
    codes[1, 2] = 0x7F
    model = write(tmp_path / "m", {"w": codes.view(torch.float8_e4m3fn)})
    with pytest.raises(InputError, match="m/model.safetensors: w: must be finite"):
        merge([model], [1.0], tmp_path / "bad", MergeConfig(dtype="bf16", unscaled_fp8=True))
    options = MergeConfig(dtype="bf16", allow_nonfinite=True, unscaled_fp8=True)
    merge([model], [1.0], tmp_path / "out", options)
    assert load(tmp_path / "out")["w"].isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "scale,config,message",
    [
        (
            torch.rand(5),
            None,
            r"w_scale_inv: must have one scale, one per row or one per block of w "
            r"\[6, 10\], got \[5\]",
        ),
        (
            torch.rand(4, 3),
            None,
            r"one per block of w \[6, 10\], got \[4, 3\]",
        ),  # ragged, and no block size told
        (
            torch.rand(3, 2),
            {"weight_block_size": [4, 4]},
            r"one per block of w \[6, 10\], got \[3, 2\]",
        ),
        (
            torch.rand(3, 2),
            {"weight_block_size": [4]},
            "weight_block_size: must be two positive integers",
        ),
        (
            torch.ones(6, dtype=torch.int32),
            None,
            "w_scale_inv: a scale must be of dtype BF16, F16, F32, F64, F8_E8M0, U8, got I32",
        ),
    ],
    ids=["rows", "ragged", "not as told", "half a block size", "integers"],
)
def test_scales_that_do_not_fit_are_named(tmp_path, scale, config, message):
    tensors, _ = quantised(6, 10, "F8_E4M3", scale)
    write_quantised(
        tmp_path / "m", tensors, {"quantization_config": FP8 | config} if config else None
    )
    with pytest.raises(InputError, match=message):
        merge([tmp_path / "m"], [1.0], tmp_path / "out", MergeConfig(dtype="bf16"))
