"""Inputs whose values are made on the way in: 8-bit floats with their scales, LoRA adapters on a base."""

import json

import numpy as np
import pytest
import torch
from support.formulas import delta_method, f64, rounded
from support.merges import bits, load, merge, write

from merit_fast.errors import InputError
from merit_fast.merge import MergeConfig
from merit_fast.merge.engine.values import float8_table

KINDS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@pytest.fixture(params=["cpu", "eager"])
def backend(request, monkeypatch):
    monkeypatch.setenv("MERIT_FAST_BACKEND", request.param)
    return request.param


# ---- 8-bit floats
def by_hand(code, mantissa, bias, top):
    """The value of a code by the OCP specification, in Python."""
    sign, exponent, fraction = (
        -1.0 if code & 128 else 1.0,
        (code & 127) >> mantissa,
        code & ((1 << mantissa) - 1),
    )
    if (code & 127) in top:
        return sign * top[code & 127]
    if exponent == 0:
        return sign * fraction / 2**mantissa * 2.0 ** (1 - bias)
    return sign * (1 + fraction / 2**mantissa) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_has_its_value(kind):
    inf, nan = float("inf"), float("nan")
    mantissa, bias, top = (
        (3, 7, {127: nan})
        if kind == "F8_E4M3"
        else (2, 15, {124: inf, 125: nan, 126: nan, 127: nan})
    )
    known = [by_hand(code, mantissa, bias, top) for code in range(256)]
    np.testing.assert_array_equal(float8_table(kind), known)
    numbers = ~np.isnan(known)
    np.testing.assert_array_equal(
        np.signbit(float8_table(kind))[numbers], np.signbit(known)[numbers]
    )
    codes = torch.arange(256, dtype=torch.uint8).view(KINDS[kind])
    np.testing.assert_array_equal(float8_table(kind), codes.double().numpy())


def quantised(rows, cols, kind, scale=None, name="w_scale_inv", config=None, seed=0):
    """(tensors, config.json) of a model with one 8-bit tensor of all finite codes and one in bf16."""
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
    models, exact = [], []
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
    options = MergeConfig(dtype="fp32", chunk_kib=4)
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
    base, other = torch.randn(40, 30).bfloat16(), torch.randn(40, 30)
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
        merge([model], [1.0], tmp_path / "bad", MergeConfig(dtype="bf16"))
    merge([model], [1.0], tmp_path / "out", MergeConfig(dtype="bf16", allow_nonfinite=True))
    assert load(tmp_path / "out")["w"].isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "scale,config,message",
    [
        (
            torch.rand(5),
            None,
            r"w_scale_inv: must have one scale, one per row or one per block of w \[6, 10\], got \[5\]",
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
            "w_scale_inv: a scale must be of a float dtype, got I32",
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


def test_a_dtype_must_be_chosen(tmp_path):
    model = write(tmp_path / "m", quantised(6, 10, "F8_E5M2")[0])
    with pytest.raises(
        InputError, match="w: is F8_E5M2; merge.dtype must choose the output's dtype"
    ):
        merge([model], [1.0], tmp_path / "out")


# ---- adapters
PREFIX = "base_model.model."
SHAPES = {
    "model.embed_tokens.weight": (50, 12),
    "model.layers.0.q_proj.weight": (20, 12),
    "lm_head.weight": (50, 12),
}


def make_base(directory, dtype=torch.bfloat16):
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    return write(directory, tensors | {"model.norm.weight": torch.randn(12).to(dtype)})


def make_adapter(directory, k, rank, alpha, modules, dtype=torch.float32, full=None, **config):
    """PEFT's files; returns (path, {name: scaling * B @ A in fp64})."""
    generator, tensors, changes = torch.Generator().manual_seed(k), {}, {}
    for name in modules:
        out, into = SHAPES[name]
        embedding, module = "embed" in name, PREFIX + name.removesuffix(".weight")
        flipped = embedding or config.get("fan_in_fan_out")
        out, into = (into, out) if flipped else (out, into)
        a = torch.randn(rank, into, generator=generator).to(dtype)
        b = torch.randn(out, rank, generator=generator).to(dtype)
        parts = (
            (".lora_embedding_A", ".lora_embedding_B")
            if embedding
            else (".lora_A.weight", ".lora_B.weight")
        )
        tensors |= {module + parts[0]: a, module + parts[1]: b}
        change = alpha / rank * (b.double().numpy() @ a.double().numpy())
        changes[name] = change.T if flipped else change
    tensors |= {PREFIX + name: tensor for name, tensor in (full or {}).items()}
    write(directory, tensors, "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", **config}
    (directory / "adapter_config.json").write_text(json.dumps(values))
    return directory, changes


def assert_exact(merged, truth, dtype):
    """Sums over the rank have an order of their own: a last bit of fp64 that seldom decides the rounding."""
    mine, exact = bits(merged).astype(np.int64), rounded(truth.ravel(), dtype).astype(np.int64)
    near = np.abs(truth.ravel()) * 2e-15 + 1e-14
    low, high = (rounded(truth.ravel() + sign * near, dtype).astype(np.int64) for sign in (-1, 1))
    assert ((mine == exact) | (mine == low) | (mine == high)).all()


def test_linear_over_adapters_is_the_base_and_their_products(tmp_path, backend):
    base = make_base(tmp_path / "base")
    start, weights = load(base), [0.2, 0.3, 0.5]
    pairs = [
        make_adapter(tmp_path / "a0", 0, 2, 6, list(SHAPES)),
        make_adapter(tmp_path / "a1", 1, 4, 4, ["model.layers.0.q_proj.weight"], torch.bfloat16),
        make_adapter(
            tmp_path / "a2",
            2,
            3,
            1.5,
            ["model.embed_tokens.weight", "lm_head.weight"],
            torch.float16,
        ),
    ]
    merge([path for path, _ in pairs], weights, tmp_path / "out", MergeConfig(chunk_kib=4), base)
    for name, tensor in load(tmp_path / "out").items():
        truth = f64(start[name]).reshape(start[name].shape)
        for weight, (_, changes) in zip(weights, pairs, strict=True):
            truth = truth + weight * changes.get(name, 0.0)
        assert_exact(tensor, truth, torch.bfloat16)
    assert torch.equal(load(tmp_path / "out")["model.norm.weight"], start["model.norm.weight"])


def test_layers_that_store_in_by_out(tmp_path, backend):
    base = make_base(tmp_path / "base")
    name = "model.layers.0.q_proj.weight"
    path, changes = make_adapter(tmp_path / "a", 0, 2, 8, [name], fan_in_fan_out=True)
    assert changes[name].shape == SHAPES[name]
    merge([path], [1.0], tmp_path / "out", MergeConfig(dtype="fp32"), base)
    assert_exact(
        load(tmp_path / "out")[name],
        load(base)[name].double().numpy() + changes[name],
        torch.float32,
    )


def test_whole_tensors_of_an_adapter_take_the_bases_place(tmp_path, backend):
    base = make_base(tmp_path / "base")
    full = {"lm_head.weight": torch.randn(50, 12), "model.norm.weight": torch.randn(12).bfloat16()}
    path, changes = make_adapter(
        tmp_path / "a", 0, 2, 2, ["lm_head.weight"], full=full, modules_to_save=["norm"]
    )
    merge([path, base], [0.5, 0.5], tmp_path / "out", MergeConfig(dtype="bf16"), base)
    merged, start = load(tmp_path / "out"), load(base)
    truth = 0.5 * (full["lm_head.weight"].double().numpy() + changes["lm_head.weight"])
    assert_exact(
        merged["lm_head.weight"],
        truth + 0.5 * start["lm_head.weight"].double().numpy(),
        torch.bfloat16,
    )
    norm = 0.5 * full["model.norm.weight"].double() + 0.5 * start["model.norm.weight"].double()
    assert_exact(merged["model.norm.weight"], norm.numpy(), torch.bfloat16)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "della", "breadcrumbs_ties"])
def test_deltas_of_adapters_and_models_are_thinned_alike(tmp_path, method, backend):
    base = make_base(tmp_path / "base", torch.float32)
    path, changes = make_adapter(tmp_path / "a", 0, 2, 6, list(SHAPES))
    model = make_base(tmp_path / "model", torch.float16)
    config = MergeConfig(method=method, density=0.5, dtype="fp32", chunk_kib=4)
    merge([path, model], [0.6, 0.4], tmp_path / "out", config, base)
    start, other = load(base), load(model)
    for name, tensor in load(tmp_path / "out").items():
        made = start[name].double() + torch.from_numpy(
            np.ascontiguousarray(changes.get(name, np.zeros(1)))
        )
        made = made if name in changes else start[name]
        truth = delta_method(
            method, name, [made, other[name]], start[name], [0.6, 0.4], density=0.5
        )
        off = np.abs(tensor.double().numpy().ravel() - truth) > 1e-6 * (1 + np.abs(truth))
        assert off.mean() < 1e-3, name  # equal but where fp64's last bit changes a rank


def test_an_adapter_on_an_8_bit_base(tmp_path, backend):
    tensors = {
        "lm_head.weight": torch.randn(50, 12).to(torch.float8_e4m3fn),
        "lm_head.weight_scale": torch.rand(50),
    }
    base = write(tmp_path / "base", tensors)
    path, changes = make_adapter(tmp_path / "a", 0, 2, 6, ["lm_head.weight"])
    merge([path, base], [0.5, 0.5], tmp_path / "out", MergeConfig(dtype="fp32", chunk_kib=4), base)
    values = (
        tensors["lm_head.weight"].double().numpy()
        * tensors["lm_head.weight_scale"].double().numpy()[:, None]
    )
    merged = load(tmp_path / "out")
    assert list(merged) == ["lm_head.weight"]
    assert_exact(merged["lm_head.weight"], values + 0.5 * changes["lm_head.weight"], torch.float32)


def test_slerp_and_stock_see_the_adapters_tensors(tmp_path, backend):
    """As if the adapter had been merged into its base before, in fp64."""
    base = make_base(tmp_path / "base", torch.float64)
    start = load(base)
    paths, whole = [], []
    for k in (0, 1):
        path, changes = make_adapter(tmp_path / f"a{k}", k, 2, 2, list(SHAPES))
        full = {
            n: t + torch.from_numpy(np.ascontiguousarray(changes[n])) if n in changes else t
            for n, t in start.items()
        }
        paths.append(path)
        whole.append(write(tmp_path / f"w{k}", full))
    for method in ("slerp", "model_stock"):
        merge(paths, [0.5, 0.5], tmp_path / f"{method}-a", MergeConfig(method=method), base)
        merge(whole, [0.5, 0.5], tmp_path / f"{method}-w", MergeConfig(method=method), base)
        ours, theirs = load(tmp_path / f"{method}-a"), load(tmp_path / f"{method}-w")
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_the_base_is_named(tmp_path):
    base = make_base(tmp_path / "base")
    path, _ = make_adapter(tmp_path / "a", 0, 2, 2, ["lm_head.weight"])
    with pytest.raises(
        InputError, match="a: is an adapter and needs the model it was trained on; give --base"
    ):
        merge([path], [1.0], tmp_path / "o1")
    small = write(tmp_path / "small", {"lm_head.weight": torch.randn(49, 12)})
    with pytest.raises(
        InputError,
        match=r"changes lm_head.weight as a float tensor of \[50, 12\], .* F32 \[49, 12\]",
    ):
        merge([path], [1.0], tmp_path / "o2", base=small)
    full = {"other.weight": torch.randn(3)}
    path, _ = make_adapter(tmp_path / "b", 0, 2, 2, ["lm_head.weight"], full=full)
    with pytest.raises(
        InputError, match="other.weight: must have the shape of other.weight in .*, no such tensor"
    ):
        merge([path], [1.0], tmp_path / "o3", base=base)
