"""Methods with coefficients from the tensors, against their formulas in plain fp64."""

import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.merge.gram_formulas import multislerp_by_hand, slerp_by_hand, stock_by_hand
from support.merge.merges import load
from support.tiny import make_model

from merit_fast.errors import InputError
from merit_fast.kernels import dispatch
from merit_fast.kernels.average._eager import float64_to_bf16
from merit_fast.merge import MergeConfig, merge_branches, merge_models
from merit_fast.merge.combine.combination import combine
from merit_fast.merge.rules.gram import (
    model_stock_coefficients,
    multislerp_coefficients,
    slerp_coefficients,
)
from merit_fast.progress import SilentProgress


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("methods")
    for k in range(4):
        make_model(root / f"m{k}", dtype=torch.bfloat16, shard="60KB", seed=k)
    return [root / f"m{k}" for k in range(4)]


def run(models, out, base=None, **options):
    out.mkdir()
    merge_branches(
        models, [1 / len(models)] * len(models), base, out, MergeConfig(**options), SilentProgress()
    )
    return load(out)


def assert_bits_nearly(merged, truth):
    """Allows one unit: coefficients differ from the formula's in their last bits."""
    mine = merged.view(torch.uint16).numpy()
    exact = float64_to_bf16(truth)
    assert np.abs(mine.astype(int) - exact.astype(int)).max() <= 1
    assert (mine != exact).mean() < 1e-3


@pytest.mark.parametrize("native", [True, False], ids=["native", "numpy"])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_tensor_by_tensor(models, tmp_path, t, native, monkeypatch):
    if not native:
        monkeypatch.setattr(dispatch, "native_module", lambda: None)
    merged = run(models[:2], tmp_path / "out", method="slerp", t=t)
    first = load(models[0])
    second = load(models[1])
    for name, tensor in merged.items():
        assert_bits_nearly(tensor, slerp_by_hand(t, first[name], second[name]))
    end = {0.0: first, 1.0: second}.get(t)
    assert end is None or all(torch.equal(merged[name], end[name]) for name in merged)


@pytest.mark.parametrize("native", [True, False], ids=["native", "numpy"])
def test_model_stock_tensor_by_tensor(models, tmp_path, native, monkeypatch):
    if not native:
        monkeypatch.setattr(dispatch, "native_module", lambda: None)
    merged = run(models[:3], tmp_path / "out", models[3], method="model_stock")
    base = load(models[3])
    parts = [load(model) for model in models[:3]]
    for name, tensor in merged.items():
        assert_bits_nearly(tensor, stock_by_hand(base[name], [part[name] for part in parts]))


@pytest.mark.parametrize("native", [True, False], ids=["native", "numpy"])
@pytest.mark.parametrize("centred", [False, True])
def test_multislerp_tensor_by_tensor(models, tmp_path, centred, native, monkeypatch):
    if not native:
        monkeypatch.setattr(dispatch, "native_module", lambda: None)
    weights = [0.5, 0.2, 0.3]
    base = models[3] if centred else None
    (tmp_path / "out").mkdir()
    config = MergeConfig(method="multislerp")
    merge_branches(models[:3], weights, base, tmp_path / "out", config, SilentProgress())
    parts = [load(model) for model in models[:3]]
    start = load(models[3])
    for name, tensor in load(tmp_path / "out").items():
        inputs = [part[name] for part in parts]
        origin = start[name] if centred else None
        if centred and all(
            torch.equal(x, origin) for x in inputs
        ):  # the norms' weights: nothing moved
            assert torch.equal(tensor, origin)
        else:
            assert_bits_nearly(tensor, multislerp_by_hand(inputs, weights, origin))


def test_multislerp_coefficients_at_the_edges():
    assert multislerp_coefficients(np.array([[4.0]]), (0.3,), "w") == (1.0,)
    opposite = np.array([[4.0, -6.0], [-6.0, 9.0]])
    assert multislerp_coefficients(opposite, (0.6, 0.4), "w") != (
        0.6,
        0.4,
    )  # the mean direction has a length
    assert multislerp_coefficients(opposite, (0.5, 0.5), "w") == (
        0.5,
        0.5,
    )  # they cancel: a straight sum
    assert multislerp_coefficients(np.zeros((3, 3)), (0.2, 0.3, 0.5), "w") == (0.2, 0.3, 0.5)
    same = multislerp_coefficients(np.full((2, 2), 4.0), (0.5, 0.5), "w")
    assert sum(same) == pytest.approx(1.0)
    star = np.full((3, 3), -0.5) + 1.5 * np.eye(3)  # three directions of a triangle
    with pytest.raises(
        InputError, match="merge: w: multislerp needs directions that do not cancel"
    ):
        multislerp_coefficients(star, (1 / 3, 1 / 3, 1 / 3), "w")


@pytest.mark.parametrize("method", ["slerp", "multislerp", "model_stock"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_dtypes_and_hard_values(tmp_path, method, dtype):
    """Single elements, denormals, the largest numbers, empty and equal tensors, zeros."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(0)
    top = 1e100 if dtype == torch.float64 else info.max / 4

    def tensors():
        signs = torch.randint(0, 2, (60,), generator=generator) * 2.0 - 1
        return {
            "single": torch.randn(1, generator=generator),
            "scalar": torch.randn((), generator=generator),
            "denormals": signs * torch.rand(60, generator=generator) * info.smallest_normal,
            "largest": signs.double() * top,
            "empty": torch.zeros(3, 0),
            "equal": torch.ones(4, 4),
            "zeros": torch.zeros(5),
            "cube": torch.randn(2, 3, 4, generator=generator),
        }

    loaded = [{name: t.to(dtype) for name, t in tensors().items()} for _ in range(3)]
    for k, tensors_of_one in enumerate(loaded):
        (tmp_path / f"m{k}").mkdir()
        save_file(tensors_of_one, tmp_path / f"m{k}/model.safetensors")
    paths = [tmp_path / "m0", tmp_path / "m1"]
    base = tmp_path / "m2" if method == "model_stock" else None
    merged = run(paths, tmp_path / "out", base, method=method)
    assert merged["empty"].shape == (3, 0) and torch.equal(
        merged["zeros"], torch.zeros(5, dtype=dtype)
    )
    torch.testing.assert_close(merged["equal"], torch.ones(4, 4, dtype=dtype))
    for name in ("single", "scalar", "cube", "largest", "denormals"):
        inputs = [model[name] for model in loaded]
        if dtype == torch.float64 and name == "denormals":
            continue  # their squares are 0 in fp64
        if method == "slerp":
            truth = slerp_by_hand(0.5, *inputs[:2])
        elif method == "multislerp":
            if name == "denormals" or (
                name != "cube" and (inputs[0].double() * inputs[1].double()).sum() <= 0
            ):
                continue  # shorter than its epsilon; opposite: they cancel
            truth = multislerp_by_hand(inputs[:2], [0.5, 0.5])
        else:
            truth = stock_by_hand(inputs[2], inputs[:2])
        error = np.abs(merged[name].double().numpy() - truth).max() / np.abs(truth).max()
        assert error < (1e-3 if dtype == torch.float16 else 1e-6), name


def test_slerp_coefficients_at_the_edges():
    parallel = np.array([[4.0, 6.0], [6.0, 9.0]])
    assert slerp_coefficients(parallel, 0.25) == (0.75, 0.25)
    assert slerp_coefficients(-parallel * np.array([[-1, 1], [1, -1]]), 0.25) == (
        0.75,
        0.25,
    )  # opposite
    assert slerp_coefficients(np.array([[0.0, 0.0], [0.0, 9.0]]), 0.25) == (0.75, 0.25)
    right = slerp_coefficients(np.diag([1.0, 4.0]), 0.5)
    assert right == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))


def test_model_stock_coefficients_at_the_edges():
    agreeing = np.ones((3, 3))
    unrelated = np.diag([1.0, 4.0, 9.0])
    assert model_stock_coefficients(agreeing) == pytest.approx((1 / 3, 1 / 3, 1 / 3, 0.0))
    assert model_stock_coefficients(unrelated) == (0.0, 0.0, 0.0, 1.0)
    assert model_stock_coefficients(np.zeros((2, 2))) == (0.0, 0.0, 1.0)
    assert model_stock_coefficients(np.array([[1.0, -1.0], [-1.0, 1.0]])) == (
        0.0,
        0.0,
        1.0,
    )  # they cancel
    half = model_stock_coefficients(np.array([[1.0, 0.5], [0.5, 1.0]]))
    assert half == pytest.approx((1 / 3, 1 / 3, 1 / 3))  # 2 * .5 / 1.5 = 2/3


def test_threads_change_no_byte(models, tmp_path):
    tensors_of_one, many = (
        run(models[:2], tmp_path / f"t{n}", method="slerp", t=0.4, threads=n, chunk_kib=8)
        for n in (1, 4)
    )
    assert all(torch.equal(tensors_of_one[name], many[name]) for name in tensors_of_one)


def test_integer_tensors_pass_and_nonfinite_ones_are_named(tmp_path):
    for k, value in enumerate((1.0, float("nan"))):
        (tmp_path / f"m{k}").mkdir()
        tensors = {
            "w": torch.full((20,), 1.0),
            "v": torch.full((3,), value),
            "ids": torch.arange(4),
        }
        save_file(tensors, tmp_path / f"m{k}/model.safetensors")
    good = run([tmp_path / "m0", tmp_path / "m0"], tmp_path / "good", method="slerp")
    assert torch.equal(good["ids"], torch.arange(4)) and torch.equal(
        good["w"], torch.full((20,), 1.0)
    )
    with pytest.raises(InputError, match="v: must be finite here and in the other models"):
        run([tmp_path / "m0", tmp_path / "m1"], tmp_path / "bad", method="slerp")


@pytest.mark.parametrize(
    "options,count,message",
    [
        ({"method": "slerp"}, 3, "slerp needs 2 models, got 3"),
        ({"method": "model_stock"}, 1, "model_stock needs 2 models or more, got 1"),
    ],
)
def test_wrong_numbers_of_models_are_named(models, options, count, message):
    with pytest.raises(InputError, match=message):
        combine(models[:count], [1.0] * count, models[3], MergeConfig(**options))


@pytest.mark.parametrize("method", ["slerp", "multislerp", "model_stock"])
@pytest.mark.parametrize("options", [{"scale": 0.5}, {"stats": True}, {"weights": (1.0, 2.0)}])
def test_options_that_do_not_go_with_these_methods_are_refused(method, options):
    key, value = next((k, list(v) if isinstance(v, tuple) else v) for k, v in options.items())
    if (method, key) == ("multislerp", "weights"):
        assert MergeConfig(method=method, **options).takes_weights
        return
    rule = "reads its inputs twice for itself" if key == "stats" else f"takes no {key}"
    with pytest.raises(
        InputError, match=re.escape(f"{key}: must be absent: method {method} {rule}, got {value!r}")
    ):
        MergeConfig(method=method, **options)


def test_model_stock_without_a_base_says_so_and_a_dry_run_reads_no_data(
    models, tmp_path, monkeypatch
):
    from merit_fast.merge.engine import prepare

    with pytest.raises(InputError, match="model_stock .*needs a base model"):
        merge_models(models[:2], out=tmp_path / "out", method="model_stock")
    monkeypatch.setattr(prepare, "gram_shard", None)  # a call would fail
    plan = merge_models(
        models[:2], base=models[3], out=tmp_path / "out", method="model_stock", dry_run=True
    )
    num_bytes = sum(t.nbytes for t in load(models[0]).values())
    assert plan["bytes_in"] == 2 * 3 * num_bytes and not list(tmp_path.iterdir())
