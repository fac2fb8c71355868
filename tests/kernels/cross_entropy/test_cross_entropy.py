"""Linear + cross-entropy on the CPU: never worse than eager against float64, for any options."""

import os

import pytest
import torch
from support import checks
from support.checks import FLOOR
from support.kernels.loss_cases import assert_never_worse, batch, everything, packed
from support.warm import run_python
from torch.nn import functional as F

from merit_fast.kernels.cross_entropy import _passes, _tiled, linear_cross_entropy
from merit_fast.kernels.labels import IGNORED_LABEL
from merit_fast.kernels.sketch import CountSketch, embedding_grad_sketch, flat_sketch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ALL = dict(bias=True, softcap=3.0, label_smoothing=0.1, z_loss=1e-2)
SKETCH = CountSketch(8192, 3)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles have at most 64 columns; tokens come in chunks of 6."""
    monkeypatch.setattr(_tiled, "FEWEST_COLUMNS", 64)
    monkeypatch.setitem(_tiled.TILE_BYTES, "cpu", 6 * 64)


@pytest.fixture
def tiles_of_all_rows(monkeypatch):
    monkeypatch.setattr(_tiled, "FEWEST_COLUMNS", 64)
    monkeypatch.setitem(_tiled.TILE_BYTES, "cpu", 40 * 64)


@pytest.fixture
def bf16_products(monkeypatch):
    """Products in bf16, as a CPU with bf16 instructions takes them."""
    monkeypatch.setattr(_tiled, "work_dtype", lambda weight: weight.dtype)


@DTYPES
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"softcap": 3.0}, {"label_smoothing": 0.2}, {"z_loss": 0.01},
     {"reduction": "sum"},
     {"divisor": 7.5}, {"divisor": torch.tensor(11)}, ALL],
    ids=["plain", "bias", "softcap", "smoothing", "z-loss", "sum", "divisor", "divisor-tensor",
         "all"],
)  # fmt: skip
def test_never_worse_than_eager(dtype, options):
    assert_never_worse(packed, "cpu", dtype, **options)


@DTYPES
@pytest.mark.parametrize("tiles", ["small_tiles", "tiles_of_all_rows"])
def test_neither_tiles_nor_chunks_change_that(dtype, tiles, request):
    request.getfixturevalue(tiles)
    assert_never_worse(packed, "cpu", dtype, **ALL)


@pytest.mark.parametrize("tiles", [None, "small_tiles", "tiles_of_all_rows"])
def test_bf16_products_are_as_good_as_eager_s(tiles, bf16_products, request):
    if tiles:
        request.getfixturevalue(tiles)
    assert_never_worse(packed, "cpu", torch.bfloat16, **ALL)


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_so_they_are_on_processors_without_bf16_instructions(instructions):
    """oneDNN, which multiplies for torch, is held to what such a processor has."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": "1"}
    chosen = "(bf16_products and all_rows) or (bit_by_bit and bfloat16)"
    command = ["-m", "pytest", "-q", "-p", "no:xdist", "-k", chosen, __file__]
    result = run_python(command, environment=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout, result.stdout


@pytest.mark.parametrize(
    "tokens,width,vocabulary", [(1, 1, 1), (1, 8, 2), (3, 7, 1025), (130, 33, 2049), (9, 2, 4097)]
)
def test_odd_shapes(tokens, width, vocabulary):
    assert_never_worse(batch, "cpu", tokens=tokens, width=width, vocabulary=vocabulary, bias=True)


def test_a_vocabulary_of_262144():
    assert_never_worse(
        batch, "cpu", tokens=5, width=3, vocabulary=262144, softcap=30.0, label_smoothing=0.1
    )


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_of_ten_thousand_neither_overflow_nor_blur(softcap):
    of = batch(softcap=softcap)
    of.hidden.round_()
    of.weight.mul_(
        1000
    ).round_()  # products of integers: logits are exact, and errors those of what follows
    assert (of.hidden @ of.weight.T).abs().max() > 5000
    assert all(value.isfinite().all() for value in everything(of, "cpu").values())
    assert_never_worse(lambda dtype: of, "cpu")


def test_words_that_a_bias_of_minus_infinity_forbids():
    of = batch(bias=True, vocabulary=3000)
    of.bias[:2050] = -torch.inf
    of.labels[of.labels >= 0] = 2500
    ours = everything(of, "cpu")
    eager = everything(of, "eager")
    for name in ("loss", "hidden", "weight"):
        torch.testing.assert_close(ours[name], eager[name])


def test_nan_in_a_trainable_row_shows_and_in_an_ignored_row_does_not():
    of = batch()
    ignored = int((of.labels == IGNORED_LABEL).nonzero()[0])
    kept = int((of.labels != IGNORED_LABEL).nonzero()[0])
    of.hidden[ignored] = torch.nan
    result = everything(of, "cpu")
    assert all(value.isfinite().all() for value in result.values())
    of.hidden[kept] = torch.nan
    result = everything(of, "cpu")
    assert result["loss"].isnan() and int(result["example_loss"].isnan().sum()) == 1


@DTYPES
def test_padded_and_packed_batches_agree_bit_by_bit(dtype):
    of = batch(tokens=3 * 11, dtype=dtype)
    shape = {"hidden": of.hidden.view(3, 11, -1), "labels": of.labels.view(3, 11)}
    padded = linear_cross_entropy(
        weight=of.weight, dataset_ids=torch.tensor([1, 0, 1]), num_datasets=2, **shape
    )
    offsets = torch.tensor([0, 11, 22, 33], dtype=torch.int32)
    flat = linear_cross_entropy(
        of.hidden,
        of.weight,
        of.labels,
        cu_seqlens=offsets,
        dataset_ids=torch.tensor([1, 0, 1]),
        num_datasets=2,
    )
    assert all(torch.equal(a, b) for a, b in zip(padded, flat, strict=True))
    by_token = linear_cross_entropy(of.hidden, of.weight, of.labels).example_loss
    torch.testing.assert_close(by_token.view(3, 11).sum(1), padded.example_loss)
    eager = F.cross_entropy((of.hidden @ of.weight.T).float(), of.labels, reduction="none")
    truth = F.cross_entropy(of.hidden.double() @ of.weight.double().T, of.labels, reduction="none")
    checks.assert_never_worse(by_token, eager, truth)
    target_tokens = (shape["labels"] != IGNORED_LABEL).sum(1)
    assert padded.dataset_tokens.tolist() == [
        int(target_tokens[1]),
        int(target_tokens[0] + target_tokens[2]),
    ]


@pytest.mark.skipif(
    _tiled.work_dtype(torch.zeros(1, dtype=torch.bfloat16)) == torch.float32,
    reason="products are float32 on a CPU without bf16 instructions",
)
@pytest.mark.parametrize("shape", [(1, 64, 1), (17, 1003, 45), (64, 2048, 128)])
def test_a_product_of_bf16_is_added_before_it_is_rounded(shape):
    rows, between, columns = shape
    a, b = torch.randn(rows, between).bfloat16(), torch.randn(between, columns).bfloat16()
    out = torch.ones(rows, columns)
    _passes.add_product(out, a, b)
    exact = a.double() @ b.double() + 1
    assert (out - exact).abs().max() < 2e-5 * exact.abs().max()  # bf16 has 4e-3


def test_the_reference_has_the_gradients_that_finite_differences_have():
    of = packed(width=5, vocabulary=9, dtype=torch.float64, **ALL)

    def losses(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, of.labels, bias=bias, **of.options)[:3]

    leaves = [tensor.clone().requires_grad_() for tensor in (of.hidden, of.weight, of.bias)]
    assert torch.autograd.gradcheck(losses, leaves)


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_without_a_target_token_all_is_zero(tokens):
    of = batch(
        tokens=tokens, bias=True, dataset_ids=torch.zeros(tokens, dtype=torch.int64), num_datasets=2
    )
    of.labels[:] = IGNORED_LABEL
    for name, value in everything(of, "cpu").items():
        assert not value.any() and value.shape == everything(of, "eager")[name].shape


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen):
    of = packed(**ALL)
    whole = everything(of, "cpu")
    partial = everything(of, "cpu", frozen=(frozen,))
    assert frozen not in partial
    assert all(torch.equal(whole[name], value) for name, value in partial.items())


def test_a_frozen_head_takes_one_product_less_and_no_gradient_keeps_nothing(monkeypatch):
    of = batch()
    seen = []
    monkeypatch.setattr(
        torch, "mm", lambda *a, _mm=torch.mm, **k: (seen.append(1), _mm(*a, **k))[1]
    )
    everything(of, "cpu")
    assert len(seen) == 2  # logits, which were kept, and dW; d_hidden is added by addmm_
    everything(of, "cpu", frozen=("weight",))
    assert len(seen) == 3
    with torch.no_grad():
        linear_cross_entropy(of.hidden, of.weight, of.labels)
    assert len(seen) == 4


def test_gradients_of_a_tied_head_add_up():
    ids = torch.randint(0, 50, (20,))
    labels = torch.randint(0, 50, (20,))
    gradients = []
    for backend in ("cpu", "eager"):
        weight = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        linear_cross_entropy(
            F.embedding(ids, weight).tanh(), weight, labels, backend=backend
        ).loss.backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("tiles", [None, "small_tiles", "tiles_of_all_rows"])
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trained", "frozen"])
@DTYPES
def test_the_sketch_of_the_head_is_that_of_its_gradient_per_example(tiles, frozen, dtype, request):
    if tiles:
        request.getfixturevalue(tiles)
    sketches = {}
    for backend in ("cpu", "eager"):
        out = torch.ones(4, SKETCH.proj_dim)
        torch.manual_seed(1)
        of = packed(
            dtype=dtype, softcap=3.0, z_loss=0.1, sketch=SKETCH, sketch_name="head", sketch_out=out
        )
        everything(of, backend, frozen=frozen)
        sketches[backend] = out - 1
    assert sketches["cpu"][1].abs().max() == 0  # the example without tokens
    error = (sketches["cpu"] - sketches["eager"]).norm() / sketches["eager"].norm()
    assert error < (1e-5 if dtype == torch.float32 else FLOOR[dtype])


def test_the_sketch_of_a_tied_head_adds_to_its_embedding_s():
    sketch = CountSketch(4096)
    ids = torch.randint(0, 150, (2, 9))
    labels = torch.randint(0, 150, (2, 9))
    weight = torch.randn(150, 12)
    rows = F.embedding(ids, weight).requires_grad_()
    rows.retain_grad()
    out = torch.zeros(2, sketch.proj_dim)
    result = linear_cross_entropy(
        rows.tanh(), weight, labels, sketch=sketch, sketch_name="tied", sketch_out=out
    )
    result.example_loss.sum().backward()
    embedding_grad_sketch(rows.grad, ids, "tied", sketch, out=out)
    for b in range(2):
        tied = weight.clone().requires_grad_()
        logits = F.embedding(ids[b], tied).tanh() @ tied.T
        F.cross_entropy(logits, labels[b], reduction="sum").backward()
        whole = flat_sketch(tied.grad[None], "tied", sketch)[0]
        torch.testing.assert_close(out[b], whole, rtol=1e-4, atol=1e-4)


def test_other_layers_may_add_to_the_sketch_before_the_backward_pass():
    out = torch.zeros(4, SKETCH.proj_dim)
    of = packed(sketch=SKETCH, sketch_name="head", sketch_out=out)
    hidden = of.hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, of.weight, of.labels, **of.options).loss
    out += 1
    loss.backward()
    assert (out - 1).norm() > 0
