"""Methods with weights for every row or column, and on the Gram matrix, against fp64 formulas."""

import numpy as np
import pytest
import torch
from support.formulas.elements import (
    karcher_by_hand,
    nuslerp_by_hand,
    rescaled_ties,
    stock_by_vector,
)
from support.merge.delta_cases import DTYPES, one, tensors
from support.merge.formulas import f64, rounded
from support.merge.merges import bits, load, merge, write

from merit_fast.errors import InputError
from merit_fast.merge import MergeConfig

VECTORS = ("tensor", "row", "column")
# Values near the ends of their range, whose squares leave fp64.
EXTREME = ("largest", "denormals", "wide range")
# Tensors whose directions cancel or do not exist: nothing but noise tells them apart.
ODD = ("empty", "cancelling", "signed zeros")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Models without extreme values, by dtype: paths, the base's path, and tensors of each."""
    made = {}
    for kind, (dtypes, _) in DTYPES.items():
        folder = tmp_path_factory.mktemp(kind.replace(" ", "-"))
        loaded = [
            {name: tensor for name, tensor in tensors(k, dtype).items() if name not in EXTREME}
            for k, dtype in enumerate(dtypes)
        ]
        paths = [write(folder / f"m{k}", model) for k, model in enumerate(loaded)]
        made[kind] = (paths[:-1], paths[-1], loaded)
    return made


def assert_near(merged, truth, inputs):
    """Allows one unit: coefficients differ from the formula's in their last bits."""
    scale = max(float(np.abs(f64(x)).max(initial=0)) for x in inputs)
    if merged.dtype in (torch.float64, torch.float32):
        tolerance = 1e-12 if merged.dtype == torch.float64 else 2e-7
        np.testing.assert_allclose(f64(merged), truth, rtol=tolerance, atol=tolerance * scale)
        return
    exact = rounded(truth, merged.dtype).astype(int)
    assert np.abs(bits(merged).astype(int) - exact).max(initial=0) <= 1


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("kind", DTYPES)
def test_nuslerp(written, tmp_path, kind, has_base, vectors, backend):
    paths, base, loaded = written[kind]
    weights = [0.3, 0.7]
    config = MergeConfig(
        method="nuslerp", vectors=vectors, dtype=DTYPES[kind][1], allow_nonfinite=True, chunk_kib=4
    )
    merge(paths[:2], weights, tmp_path / "out", config, base if has_base else None)
    for name, tensor in load(tmp_path / "out").items():
        inputs = [model[name] for model in loaded[:2]]
        if name in ODD or (name == "all equal" and not has_base):
            continue
        truth = nuslerp_by_hand(inputs, weights, vectors, loaded[3][name] if has_base else None)
        assert_near(tensor, truth, [*inputs, loaded[3][name]])


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("kind", ["bf16", "fp64", "mixed"])
def test_model_stock(written, tmp_path, kind, vectors, backend):
    paths, base, loaded = written[kind]
    config = MergeConfig(
        method="model_stock",
        vectors=vectors,
        dtype=DTYPES[kind][1],
        allow_nonfinite=True,
        chunk_kib=4,
    )
    merge(paths, [1 / 3] * 3, tmp_path / "out", config, base)
    for name, tensor in load(tmp_path / "out").items():
        inputs = [model[name] for model in loaded[:3]]
        if name not in ODD:
            truth = stock_by_vector(loaded[3][name], inputs, vectors)
            assert_near(tensor, truth, [*inputs, loaded[3][name]])


@pytest.mark.parametrize("kind", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("options", [{}, {"parameters": {"max_iter": 1}}])
def test_karcher(written, tmp_path, kind, options, backend):
    paths, _, loaded = written[kind]
    merge(paths, [1 / 3] * 3, tmp_path / "out", MergeConfig(method="karcher", **options))
    limits = options.get("parameters", {})
    for name, tensor in load(tmp_path / "out").items():
        inputs = [model[name] for model in loaded[:3]]
        if name not in ODD:
            assert_near(tensor, karcher_by_hand(inputs, **limits), inputs)


def test_karcher_of_equal_opposite_and_zero_tensors(tmp_path, backend):
    x = torch.tensor([3.0, 4.0, 0.0])
    merged = one(tmp_path / "a", [x, x], x, method="karcher")
    torch.testing.assert_close(merged, x)
    merged = one(tmp_path / "b", [x, -x], x, method="karcher")
    torch.testing.assert_close(merged, x)  # the first where no mean direction is
    merged = one(tmp_path / "c", [x, 0 * x], x, method="karcher")
    torch.testing.assert_close(merged, x / 2)
    merged = one(tmp_path / "d", [0 * x, 0 * x], x, method="karcher")
    assert not merged.any()
    assert torch.equal(one(tmp_path / "e", [x], x, method="karcher"), x)


@pytest.mark.parametrize("method, vectors", [("nuslerp", v) for v in VECTORS[1:]])
def test_threads_chunks_and_engines_change_no_bit(written, tmp_path, monkeypatch, method, vectors):
    paths, base, _ = written["mixed"]
    outputs = set()
    for number, (threads, chunk, backend) in enumerate(
        [(1, 4, "cpu"), (3, 5, "cpu"), (2, 1024, "cpu"), (1, 64, "eager")]
    ):
        monkeypatch.setenv("MERIT_FAST_BACKEND", backend)
        config = MergeConfig(
            method=method,
            vectors=vectors,
            dtype="bf16",
            allow_nonfinite=True,
            threads=threads,
            chunk_kib=chunk,
        )
        merge(paths[:2], [0.4, 0.6], tmp_path / f"{number}", config, base)
        outputs.add((tmp_path / f"{number}/model.safetensors").read_bytes())
    assert len(outputs) == 1


@pytest.mark.parametrize("vectors", VECTORS)
def test_wide_and_tall_tensors(tmp_path, vectors, backend):
    generator = torch.Generator().manual_seed(0)
    for number, shape in enumerate([(5, 4100), (4100, 3), (2, 3, 2100)]):
        a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        folder = tmp_path / f"{number}"
        merged = one(folder, [a, b], a, [0.2, 0.8], method="nuslerp", vectors=vectors, chunk_kib=4)
        truth = nuslerp_by_hand([a, b], [0.2, 0.8], vectors, a)
        np.testing.assert_allclose(f64(merged), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vectors", ["row", "column"])
def test_a_bad_value_is_named(tmp_path, vectors, backend):
    a = torch.ones(40, 30)
    b = torch.ones(40, 30)
    b[37, 3] = float("nan")
    with pytest.raises(InputError, match=r"m1/model.safetensors: w: must be finite, holds NaN"):
        one(tmp_path, [a, b], a, method="nuslerp", vectors=vectors)


@pytest.mark.parametrize("kind", ["bf16", "fp32", "mixed"])
def test_ties_with_rescale(written, tmp_path, kind, backend):
    paths, base, loaded = written[kind]
    weights = [0.5, 0.2, 0.3]
    config = MergeConfig(
        method="ties",
        density=0.4,
        rescale=True,
        dtype=DTYPES[kind][1],
        allow_nonfinite=True,
        chunk_kib=4,
    )
    merge(paths, weights, tmp_path / "out", config, base)
    for name, tensor in load(tmp_path / "out").items():
        inputs = [model[name] for model in loaded[:3]]
        if name not in ODD:
            truth = rescaled_ties(inputs, loaded[3][name], weights, 0.4)
            assert_near(tensor, truth, [*inputs, loaded[3][name]])


def test_dare_without_rescale_keeps_deltas_as_they_are(tmp_path, backend):
    base = torch.zeros(4000)
    model = torch.full((4000,), 0.25)
    plain = one(tmp_path / "a", [model], base, method="dare_linear", density=0.5, rescale=False)
    enlarged = one(tmp_path / "b", [model], base, method="dare_linear", density=0.5)
    assert set(plain.tolist()) == {0.0, 0.25} and set(enlarged.tolist()) == {0.0, 0.5}
    assert torch.equal(plain * 2, enlarged)
    ranked = one(tmp_path / "c", [model], base, method="della", density=0.5, rescale=False)
    assert set(ranked.tolist()) == {0.0, 0.25}


def test_output_in_float64(tmp_path, backend):
    a = torch.tensor([1.0, 2.0], dtype=torch.float32)
    b = torch.tensor([2.0, 4.0], dtype=torch.float32)
    merged = one(tmp_path, [a, b], a, [1 / 3, 2 / 3], method="linear", dtype="fp64")
    assert merged.dtype == torch.float64
    exact = 1 / 3 * a.double() + 2 / 3 * b.double()
    assert torch.equal(merged, exact)
