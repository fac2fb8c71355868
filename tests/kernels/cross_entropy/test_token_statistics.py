"""Log-probabilities, entropy and top-1 without logits: against float64, and against TRL."""

import re

import pytest
import torch
from support import checks
from support.kernels.loss_cases import batch

from merit_fast.errors import BackendUnavailableError
from merit_fast.kernels.cross_entropy import (
    IGNORED_LABEL,
    _statistics_ops,
    _tiled,
    linear_cross_entropy,
    linear_token_statistics,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
FORM = dict(softcap=3.0, scale=0.7, temperature=1.3)


@pytest.fixture(params=[None, 6 * 64, 40 * 64], ids=["one tile", "chunks", "tiles"])
def tiles(request, monkeypatch):
    """Tiles have at most 64 columns; with so few bytes a tile, tokens come in chunks of 6."""
    if request.param:
        monkeypatch.setattr(_tiled, "FEWEST_COLUMNS", 64)
        monkeypatch.setitem(_tiled.TILE_BYTES, "cpu", request.param)


def results_of(of, backend, dtype=None, frozen=(), **form):
    """All statistics, and the gradients of a function of them, by name."""
    tensors = {"hidden": of.hidden, "weight": of.weight, "bias": of.bias}
    leaves = {
        name: tensor.to(dtype or tensor.dtype, copy=True).requires_grad_(name not in frozen)
        for name, tensor in tensors.items()
        if tensor is not None
    }
    statistics = linear_token_statistics(
        labels=of.labels, entropy=True, top1=True, backend=backend, **leaves, **form
    )
    factors = torch.linspace(-0.4, 0.6, len(of.labels))
    total = statistics.log_probs * factors + statistics.entropy * factors.flip(0)
    (total + 0.1 * statistics.log_sum_exp).sum().backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if name not in frozen}
    return {**statistics._asdict(), **gradients}


def assert_never_worse(dtype, bias=False, **form):
    """No statistic and no gradient has more error than eager's; in bf16 over many draws."""
    draws = checks.DRAWS if dtype == torch.bfloat16 else 1
    runs = []
    for _ in range(draws):
        of = batch(dtype=dtype, bias=bias)
        runs.append(
            (
                results_of(of, "cpu", **form),
                results_of(of, "eager", **form),
                results_of(of, "eager", torch.float64, **form),
            )
        )
    for name in runs[0][0]:
        if name == "is_top1":
            continue
        ours, eager, truth = (torch.cat([run[k][name].flatten() for run in runs]) for k in range(3))
        assert ours.dtype == eager.dtype
        share = checks.rounding_share(len(truth)) if draws > 1 else 0.0
        checks.assert_never_worse(ours.detach(), eager.detach(), truth.detach(), share, name)


@DTYPES
@pytest.mark.parametrize(
    "form",
    [{}, {"bias": True}, {"softcap": 3.0}, {"scale": -0.3}, {"temperature": 0.4},
     {"bias": True, **FORM}],
    ids=["plain", "bias", "softcap", "scale", "temperature", "all"],
)  # fmt: skip
def test_never_worse_than_eager(dtype, form):
    assert_never_worse(dtype, **form)


@DTYPES
def test_neither_tiles_nor_chunks_change_that(dtype, tiles):
    assert_never_worse(dtype, bias=True, **FORM)


def test_the_reference_has_the_gradients_that_finite_differences_have():
    of = batch(tokens=6, width=5, vocabulary=9, dtype=torch.float64, bias=True)

    def statistics(hidden, weight, bias):
        found = linear_token_statistics(hidden, weight, of.labels, bias=bias, entropy=True, **FORM)
        return found.log_probs, found.entropy, found.log_sum_exp

    leaves = [tensor.clone().requires_grad_() for tensor in (of.hidden, of.weight, of.bias)]
    assert torch.autograd.gradcheck(statistics, leaves)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_the_log_probabilities_are_those_of_the_loss(backend):
    of = batch(bias=True)
    statistics = linear_token_statistics(
        of.hidden, of.weight, of.labels, bias=of.bias, softcap=3.0, backend=backend
    )
    loss = linear_cross_entropy(
        of.hidden, of.weight, of.labels, bias=of.bias, softcap=3.0, backend=backend
    )
    torch.testing.assert_close(-statistics.log_probs, loss.example_loss)
    assert statistics.entropy is None and statistics.is_top1 is None


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_of_equal_logits_the_first_is_top_1(backend, tiles):
    weight = torch.zeros(1000, 4)
    weight[[70, 300, 301, 999], 0] = 1.0  # four words share the largest logit
    labels = torch.tensor([70, 300, 301, 999, 0, IGNORED_LABEL])
    hidden = torch.ones(6, 4)
    top = linear_token_statistics(hidden, weight, labels, top1=True, backend=backend).is_top1
    assert top.tolist() == [True, False, False, False, False, False]
    flat = linear_token_statistics(
        hidden, weight, labels, scale=0.0, top1=True, entropy=True, backend=backend
    )
    assert flat.is_top1.tolist() == [False, False, False, False, True, False]
    torch.testing.assert_close(flat.entropy[:5], torch.full((5,), 1000.0).log())


def test_top_1_is_argmax_s(tiles):
    of = batch(tokens=90)
    best = (of.hidden @ of.weight.T).argmax(-1)
    labels = torch.where(torch.arange(90) % 2 == 0, best, of.labels)
    top = linear_token_statistics(of.hidden, of.weight, labels, top1=True).is_top1
    assert torch.equal(top, labels == best)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_ignored_rows_give_zero_and_enter_nothing(backend):
    of = batch(bias=True)
    ignored = of.labels == IGNORED_LABEL
    of.hidden[ignored] = torch.nan
    found = results_of(of, backend)
    for name in ("log_probs", "entropy", "is_top1", "log_sum_exp", "hidden"):
        assert not found[name][ignored].any(), name
    assert all(value.isfinite().all() for value in found.values())
    of.labels[:] = IGNORED_LABEL
    assert not any(value.any() for value in results_of(of, backend).values())


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_words_that_a_bias_of_minus_infinity_forbids(backend):
    of = batch(bias=True, vocabulary=3000)
    of.bias[:2050] = -torch.inf
    of.bias[2900:] = -torch.inf
    of.labels[of.labels >= 0] = 2500
    found = results_of(of, backend, frozen=("bias",))
    kept = slice(2050, 2900)
    small = type(of)(of.hidden, of.weight[kept], of.labels.clone(), of.bias[kept])
    small.labels[small.labels >= 0] -= 2050
    expected = results_of(small, "eager", frozen=("bias",))
    for name in ("log_probs", "entropy", "log_sum_exp", "hidden"):
        torch.testing.assert_close(found[name], expected[name])
    torch.testing.assert_close(found["weight"][kept], expected["weight"])


def test_a_confident_model_s_entropy_has_no_cancellation():
    """The entropy of logits (1000, 980, ...) is 4e-8; log-sum-exp minus a mean would give 0."""
    weight = torch.tensor([[1000.0], [980.0], [0.0]])
    labels = torch.tensor([0])
    found = linear_token_statistics(torch.ones(1, 1), weight, labels, entropy=True).entropy
    logits = torch.tensor([1000.0, 980.0, 0.0], dtype=torch.float64)
    truth = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(found[0].double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_a_frozen_tensor_gets_no_gradient_and_changes_no_other(frozen):
    of = batch(bias=True)
    whole = results_of(of, "cpu", **FORM)
    partial = results_of(of, "cpu", frozen=(frozen,), **FORM)
    assert frozen not in partial
    assert all(torch.equal(whole[name], value) for name, value in partial.items())


def test_a_batch_of_rows_has_the_shape_of_its_labels():
    of = batch(tokens=33)
    flat = linear_token_statistics(of.hidden, of.weight, of.labels, entropy=True, top1=True)
    hidden = of.hidden.view(3, 11, -1)
    rows = linear_token_statistics(
        hidden, of.weight, of.labels.view(3, 11), entropy=True, top1=True
    )
    assert all(torch.equal(a.view(3, 11), b) for a, b in zip(flat, rows, strict=True))


@pytest.mark.parametrize("form", [{}, FORM], ids=["plain", "all"])
def test_trl_s_function_gives_the_same(form):
    trl = pytest.importorskip("trl.kernels.chunked_logprob")
    of = batch(bias=True)
    of.labels[of.labels < 0] = 7
    ours = results_of(of, "cpu", **form)
    leaves = [tensor.clone().requires_grad_() for tensor in (of.hidden, of.weight, of.bias)]
    log_probs, entropy, _, _, is_top1 = trl.ChunkedLogProbFunction.apply(
        *leaves, of.labels, form.get("temperature", 1.0), 100, form.get("softcap"),
        form.get("scale", 1.0), ("entropy", "is_top1"),
    )  # fmt: skip
    torch.testing.assert_close(ours["log_probs"], log_probs)
    torch.testing.assert_close(ours["entropy"], entropy)
    assert torch.equal(ours["is_top1"], is_top1)
    found = linear_token_statistics(*leaves[:2], of.labels, bias=leaves[2], entropy=True, **form)
    for of_trl, of_ours in zip(
        torch.autograd.grad((log_probs * entropy).sum(), leaves),
        torch.autograd.grad((found.log_probs * found.entropy).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(of_ours, of_trl, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive, got nan"),
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"softcap": -1.0}, "softcap must be positive and finite, got -1.0"),
        ({"weight": torch.zeros(1003, 45, device="meta")}, "weight must be on hidden's device"),
        ({"labels": torch.full((37,), 1003)}, "labels must be -100 or in [0, 1003), got 1003"),
        ({"labels": torch.zeros(36, dtype=torch.int64)}, "labels must be int64 [37]"),
        ({"weight": torch.zeros(9, 44)}, "weight must be torch.float32 [V, 45] as hidden is"),
        ({"bias": torch.zeros(3)}, "bias must be torch.float32 [1003], got torch.float32 [3]"),
        ({"hidden": torch.zeros(37, 45).half()}, "got torch.float16 [37, 45]"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_bad_argument_is_an_error_that_names_it(backend, changes, words):
    of = batch()
    arguments = {"hidden": of.hidden, "weight": of.weight, "labels": of.labels, **changes}
    with pytest.raises(ValueError, match="^linear_token_statistics: .*" + re.escape(words)):
        linear_token_statistics(**arguments, backend=backend)


def test_backends_that_cannot_run_say_why():
    of = batch()
    with pytest.raises(BackendUnavailableError, match="linear_token_statistics: backend 'cuda'"):
        linear_token_statistics(of.hidden, of.weight, of.labels, backend="cuda")
    with pytest.raises(ValueError, match="only the eager backend computes in float64"):
        linear_token_statistics(of.hidden.double(), of.weight.double(), of.labels, backend="cpu")


def test_the_ops_are_what_torch_library_asks_for():
    of = batch(bias=True)
    leaves = [tensor.requires_grad_() for tensor in (of.hidden, of.weight, of.bias)]
    form = (5.0, 0.5, 2.0, [0, 1003], "")
    op = _statistics_ops.token_statistics_op
    torch.library.opcheck(op, (*leaves, of.labels, *form, True, "cpu"))
    detached = [leaf.detach() for leaf in leaves]
    _, entropy, _, _, softmax, kept = op(*detached, of.labels, *form, True, "cpu")
    upstream = (torch.randn(37), None, torch.randn(37), [True, False, True])
    torch.library.opcheck(
        _statistics_ops.token_statistics_backward,
        (*detached, of.labels, *form, "cpu", entropy, softmax, kept, *upstream),
    )


def test_torch_compile_sees_one_graph_and_gives_the_same():
    of = batch(bias=True)

    def step(hidden, weight, bias):
        found = linear_token_statistics(
            hidden.tanh(), weight, of.labels, bias=bias, entropy=True, top1=True, **FORM
        )
        return (found.log_probs.exp() * found.entropy).sum(), found.is_top1

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in (of.hidden, of.weight, of.bias)]
        total, top = run(*leaves)
        total.backward()
        results.append([total.detach(), top, *(leaf.grad for leaf in leaves)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-6, atol=1e-7)
