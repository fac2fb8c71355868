"""Linear layers of a sketched model in fp32: another library's products, the same values."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from merit_fast import sketch_gradients
from merit_fast.sketch import frozen_linear as module


@pytest.fixture
def everywhere(monkeypatch):
    """Lets the faster product run on any processor and for any size."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(module, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(module, "_LEAST_PRODUCTS", 1)


@pytest.fixture
def calls(monkeypatch):
    """Counts layers that the faster product computes."""
    counted = []
    original = module.frozen_linear

    def counting(*args):
        counted.append(1)
        return original(*args)

    monkeypatch.setattr(module, "frozen_linear", counting)
    return counted


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (1, 1, 1, 7)])
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_both_gradients_are_those_of_f_linear(shape, strided):
    torch.manual_seed(0)
    x = torch.randn(*shape)
    if strided:
        x = torch.randn(*shape[:-1], 14)[..., ::2]
    weight = torch.randn(11, 7)
    bias = torch.randn(11, requires_grad=True)
    mine = x.clone().requires_grad_() if not strided else x.requires_grad_()
    theirs = x.detach().double().requires_grad_()
    dy = torch.randn(*shape[:-1], 11)
    y = module.frozen_linear(mine, weight, bias)
    wanted = F.linear(theirs, weight.double(), bias.detach().double().requires_grad_())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    y.backward(dy)
    wanted.backward(dy.double())
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, dy.flatten(0, -2).sum(0), rtol=1e-5, atol=1e-5)


def test_a_gradient_of_the_gradient_exists():
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4)
    y = module.frozen_linear(x, weight, None)
    (first,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, (2 * weight.T @ weight).sum(0).expand(3, 4))


def test_sketches_agree_with_those_of_torch_s_own_products(everywhere, calls, monkeypatch):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4, bias=False))
    x = torch.randn(5, 3, 6)

    def sketches():
        with sketch_gradients(model, 4096, check="first") as sketcher:
            for _ in range(2):  # the first pass is compared with autograd's own
                model(x).square().sum((1, 2)).sum().backward()
                found = sketcher.update(["all"] * 5)
            return found

    mine = sketches()
    assert calls
    calls.clear()
    monkeypatch.setattr(module, "_mkl_is_slow", lambda: False)
    torch.testing.assert_close(mine, sketches(), rtol=1e-4, atol=1e-5)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_keep_torch_s_product(everywhere, dtype):
    x = torch.randn(4, 6, dtype=dtype)
    assert not module.suits_onednn(x, torch.randn(3, 6, dtype=dtype))


def test_it_stays_out_of_everything_it_does_not_know(everywhere):
    x = torch.randn(4, 6)
    weight = torch.randn(3, 6)
    assert module.suits_onednn(x, weight)
    assert not module.suits_onednn(x, weight.clone().requires_grad_())
    assert not module.suits_onednn(x[0], weight)
    assert not module.suits_onednn(nn.Parameter(x), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not module.suits_onednn(x, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not module.suits_onednn(x, weight)
    seen = []
    torch.vmap(lambda row: seen.append(module.suits_onednn(row, weight)) or row)(x[None])
    assert seen == [False]
