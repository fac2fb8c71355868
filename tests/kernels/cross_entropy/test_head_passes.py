"""The native passes over a whole bf16 head: as good as eager, for any shape and any threads."""

import pytest
import torch
from support import checks
from support.kernels.loss_cases import batch, everything, packed

from merit_fast.kernels import dispatch
from merit_fast.kernels.cross_entropy import (
    _native,
    _tiled,
    linear_cross_entropy,
    linear_token_statistics,
)
from merit_fast.kernels.sketch import CountSketch

BF16 = torch.bfloat16
ALL = dict(bias=True, softcap=3.0, label_smoothing=0.1, z_loss=1e-2)

pytestmark = pytest.mark.skipif(
    dispatch.native_module() is None or not _native.has_head_passes(torch.zeros(1, 16, dtype=BF16)),
    reason="this processor has no products of bf16 pairs (AVX-512), or AMX in their place",
)


@pytest.fixture
def passes(monkeypatch):
    """Counts the native passes."""
    seen = []
    for name in ("head_forward", "head_backward"):
        run = getattr(_native, name)
        monkeypatch.setattr(
            _native, name, lambda *a, run=run, name=name: (seen.append(name), run(*a))[1]
        )
    return seen


@pytest.fixture(params=["kept", "some kept", "computed again"])
def kept(request, monkeypatch):
    """A budget that keeps logits for the backward pass: of all words, of some chunks, or none."""
    numel = {"some kept": 150 * 48, "computed again": 0}.get(request.param)
    if numel is not None:
        monkeypatch.setattr(_tiled, "kept_numel", lambda hidden, weight: numel)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"softcap": 3.0}, {"label_smoothing": 0.2}, {"z_loss": 0.01}, ALL],
    ids=["plain", "bias", "softcap", "smoothing", "z-loss", "all"],
)
def test_never_worse_than_eager(options, passes):
    drawn = [packed(width=48, dtype=BF16, **options) for _ in range(checks.DRAWS)]
    assert_never_worse_over(drawn)
    assert passes.count("head_forward") == passes.count("head_backward") == len(drawn)


@pytest.mark.parametrize("tokens", [1700, 4090])
def test_thousands_of_rows_are_never_worse_than_eager(tokens, passes):
    """Sums over all rows in one product, for the gradient of the weight."""
    assert_never_worse_over([batch(tokens, 32, 150, BF16) for _ in range(checks.DRAWS)])
    assert passes


def test_neither_kept_nor_computed_logits_change_that(kept, passes):
    assert_never_worse_over([packed(width=112, dtype=BF16, **ALL) for _ in range(checks.DRAWS)])
    assert passes


def assert_never_worse_over(drawn):
    """Errors of results and gradients over all drawn batches, against those of eager."""
    runs = [
        (everything(of, "cpu"), everything(of, "eager"), everything(of, "eager", torch.float64))
        for of in drawn
    ]
    for name in (name for name, value in runs[0][2].items() if value.numel()):
        ours, eager, truth = (
            torch.cat([run[k][name].detach().flatten() for run in runs]) for k in range(3)
        )
        share = checks.rounding_share(len(truth))
        checks.assert_never_worse(ours, eager, truth, share, name)


@pytest.mark.parametrize(
    "tokens,width,vocabulary",
    [(1, 16, 1), (2, 16, 2), (17, 32, 63), (49, 48, 65), (130, 80, 1089), (9, 144, 4097)],
)
def test_odd_shapes(tokens, width, vocabulary, passes):
    shape = dict(tokens=tokens, width=width, vocabulary=vocabulary, dtype=BF16, bias=True)
    assert_never_worse_over([batch(**shape) for _ in range(checks.DRAWS)])
    assert passes


def test_the_backward_pass_takes_the_backend_of_the_forward_pass(monkeypatch, passes):
    """The layout of the logits that the forward pass keeps is its backend's own."""
    of = packed(width=48, dtype=BF16)
    hidden, weight = (tensor.requires_grad_() for tensor in (of.hidden, of.weight))
    loss = linear_cross_entropy(hidden, weight, of.labels, **of.options).loss
    statistics = linear_token_statistics(hidden, weight, of.labels).log_probs.sum()
    results = []
    for environment in (None, "eager"):
        if environment:
            monkeypatch.setenv("MERIT_FAST_BACKEND", environment)
        results.append(
            [
                gradient
                for value in (loss, statistics)
                for gradient in torch.autograd.grad(value, (hidden, weight), retain_graph=True)
            ]
        )
    assert passes.count("head_backward") == 4
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_products_of_bf16_in_torch_the_head_takes_the_tiles(monkeypatch, passes):
    """The tiles widen the logits that they keep; a native pass would read those as bf16."""
    of = packed(width=48, dtype=BF16)
    for module in (_tiled, _native):
        monkeypatch.setattr(module, "work_dtype", lambda weight: torch.float32)
    ours = everything(of, "cpu")
    assert not passes
    for name, value in everything(of, "eager").items():
        torch.testing.assert_close(ours[name], value, rtol=2e-2, atol=2e-2)


def test_more_rows_than_a_pass_takes_give_the_same(monkeypatch, passes):
    of = packed(width=48, dtype=BF16)
    whole = everything(of, "cpu")
    assert len(passes) == 2
    monkeypatch.setattr(_tiled, "MOST_ROWS", 8)
    tiled = everything(of, "cpu")
    assert len(passes) == 2
    for name, value in whole.items():
        torch.testing.assert_close(value, tiled[name], rtol=2e-2, atol=2e-2)


def test_the_number_of_threads_changes_no_bit(passes):
    of = packed(width=80, vocabulary=3000, dtype=BF16, **ALL)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(of, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert passes
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_a_frozen_tensor_gets_no_gradient_and_changes_no_other(frozen, passes):
    of = packed(width=48, dtype=BF16, **ALL)
    whole = everything(of, "cpu")
    partial = everything(of, "cpu", frozen=(frozen,))
    assert passes and frozen not in partial
    assert all(torch.equal(whole[name], value) for name, value in partial.items())


@pytest.mark.parametrize("form", [{}, dict(softcap=3.0, scale=-0.7, temperature=1.3)], ids=str)
def test_the_statistics_of_tokens(form, kept, passes):
    of = batch(tokens=60, width=48, dtype=BF16, bias=True)
    of.labels[::5] = (of.hidden[::5].float() @ of.weight.float().T + of.bias.float()).argmax(-1)
    results = []
    for backend, dtype in (("cpu", BF16), ("eager", BF16), ("eager", torch.float64)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (of.hidden, of.weight, of.bias)]
        found = linear_token_statistics(
            leaves[0], leaves[1], of.labels, bias=leaves[2], entropy=True, top1=True,
            backend=backend, **form,
        )  # fmt: skip
        (found.log_probs * 0.3 + found.entropy + 0.1 * found.log_sum_exp).sum().backward()
        results.append([*found, *(leaf.grad for leaf in leaves)])
    assert passes == ["head_forward", "head_backward"]
    for ours, eager, truth in zip(*results, strict=True):
        if truth.dtype == torch.bool:
            continue
        share = checks.rounding_share(truth.numel()) + 0.1
        checks.assert_never_worse(ours.detach(), eager.detach(), truth.detach(), share)


def test_words_that_a_bias_of_minus_infinity_forbids(passes):
    of = batch(width=48, bias=True, vocabulary=3000, dtype=BF16)
    of.bias[:2050] = -torch.inf
    of.labels[of.labels >= 0] = 2500
    ours = everything(of, "cpu")
    eager = everything(of, "eager")
    assert passes
    for name in ("loss", "hidden", "weight"):
        torch.testing.assert_close(ours[name], eager[name], rtol=2e-2, atol=2e-2)


def test_nan_in_a_trainable_row_shows(passes):
    of = batch(width=48, dtype=BF16)
    of.hidden[int((of.labels >= 0).nonzero()[0])] = torch.nan
    result = everything(of, "cpu")
    assert passes
    assert result["loss"].isnan() and int(result["example_loss"].isnan().sum()) == 1


def test_a_sketch_of_the_head_takes_the_tiles(passes):
    of = packed(width=48, dtype=BF16)
    out = torch.zeros(4, 4096)
    everything(of.with_options(sketch=CountSketch(4096), sketch_name="head", sketch_out=out), "cpu")
    assert not passes and out.any()
