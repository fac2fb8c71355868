"""LoRA adapters are merged as base plus product."""

import json

import numpy as np
import pytest
import torch
from support.merge.formulas import delta_method, f64, rounded
from support.merge.merges import bits, load, merge, write

from merit_fast.errors import InputError
from merit_fast.merge import MergeConfig

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
    generator = torch.Generator().manual_seed(k)
    tensors = {}
    changes = {}
    for name in modules:
        out, into = SHAPES[name]
        embedding = "embed" in name
        module = PREFIX + name.removesuffix(".weight")
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
    """Allows what a last bit of fp64 decides: sums over the rank have their own order."""
    mine = bits(merged).astype(np.int64)
    exact = rounded(truth.ravel(), dtype).astype(np.int64)
    near = np.abs(truth.ravel()) * 2e-15 + 1e-14
    low, high = (rounded(truth.ravel() + sign * near, dtype).astype(np.int64) for sign in (-1, 1))
    assert ((mine == exact) | (mine == low) | (mine == high)).all()


def test_linear_over_adapters_is_the_base_and_their_products(tmp_path, backend):
    base = make_base(tmp_path / "base")
    start = load(base)
    weights = [0.2, 0.3, 0.5]
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
    merged = load(tmp_path / "out")
    start = load(base)
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
    start = load(base)
    other = load(model)
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
    """The adapter merged into its base, in fp64."""
    base = make_base(tmp_path / "base", torch.float64)
    start = load(base)
    paths = []
    whole = []
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
        ours = load(tmp_path / f"{method}-a")
        theirs = load(tmp_path / f"{method}-w")
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
        match=r"changes lm_head.weight as a float tensor of \[50, 12\], the base has \[49, 12\]",
    ):
        merge([path], [1.0], tmp_path / "o2", base=small)
    full = {"other.weight": torch.randn(3)}
    path, _ = make_adapter(tmp_path / "b", 0, 2, 2, ["lm_head.weight"], full=full)
    with pytest.raises(
        InputError, match="changes the float tensor other.weight, .* has no such tensor"
    ):
        merge([path], [1.0], tmp_path / "o3", base=base)
