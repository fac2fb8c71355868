"""K-FAC for every kind of parameter and precision: whole models in bf16, odd uses, convolutions."""

import pytest
import torch
from support.checks import assert_close
from support.sketch.exact_gradients import ragged_examples, summed_loss, tiny
from support.sketch.odd_modules import TimeFirst
from torch import nn

import merit_fast
from merit_fast.errors import MeritFastError


def test_slow_parameters_have_the_mean_square_of_their_entries():
    """Parameters that take a backward pass per example are multiplied entry by entry."""
    model = TimeFirst().eval()
    torch.manual_seed(2)
    x = torch.randn(3, 5, 6)
    options = dict(uncovered="autograd")
    with pytest.warns(UserWarning, match="backward pass per example"):
        with merit_fast.kfac_factors(model, **options) as collector:
            for _ in range(2):
                try:
                    model(x).square().sum().backward()
                    collector.update()
                    break
                except MeritFastError:
                    collector.discard()
        factors = collector.factors()
        with merit_fast.sketch_gradients(
            model, proj_dim=4096, normalize="kfac", factors=factors, check="always", **options
        ) as sketcher:
            for _ in range(2):
                try:
                    model(x).square().sum().backward()
                    sketches = sketcher.take()
                    break
                except MeritFastError:
                    sketcher.discard()
    assert factors.examples == 3
    assert sketches.isfinite().all()
    assert sketcher.checked.sum_error < 2e-5


class Scaled(nn.Module):
    """Multiplies by a function of another module's weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x * torch.tanh(self.weight).sum(0)


def test_a_matrix_with_a_use_that_is_no_product_is_multiplied_entry_by_entry():
    """Its mean squares are those of the product, S_ii A_jj, plus those of the other gradient."""
    torch.manual_seed(0)
    inner = nn.Linear(5, 5, bias=False)
    model = nn.Sequential(inner, nn.Tanh(), Scaled(inner.weight), nn.Linear(5, 2))
    x = torch.randn(3, 4, 5)
    hidden = torch.tanh(inner(x)).detach()
    outputs = []

    def keep(module, args, output):
        output.register_hook(outputs.append)

    handle = inner.register_forward_hook(keep)
    with merit_fast.kfac_factors(model, check="never") as collector:
        model(x).square().sum().backward()
        collector.update()
    handle.remove()
    flat = outputs[0].flatten(0, 1)
    expected = torch.outer(flat.square().sum(0), x.flatten(0, 1).square().mean(0)) / 3
    for example in hidden:
        weight = inner.weight.detach().requires_grad_()
        scaled = model[3](example * torch.tanh(weight).sum(0))
        (gradient,) = torch.autograd.grad(scaled.square().sum(), weight)
        expected += gradient.square() / 3
    assert_close(collector.factors().diagonals["0.weight"], expected)


def test_bf16_holds_the_check():
    model = tiny("llama").to(torch.bfloat16)
    examples = ragged_examples()
    with merit_fast.kfac_factors(model) as collector:
        summed_loss(model, examples).backward()
        collector.update()
    with merit_fast.sketch_gradients(
        model, proj_dim=4096, normalize="kfac", factors=collector.factors(), check="always"
    ) as sketcher:
        summed_loss(model, examples).backward()
        assert sketcher.take().isfinite().all()
    assert sketcher.checked.kinds == 1


def test_a_backward_pass_within_autocast_multiplies_in_fp32():
    """The values come in bf16; factors and products with them do not."""
    model = tiny("llama")
    examples = ragged_examples()
    results = []
    for within in (False, True):
        with merit_fast.kfac_factors(model) as collector:
            with torch.autocast("cpu", torch.bfloat16):
                loss = summed_loss(model, examples)
                if within:
                    loss.backward()
            if not within:
                loss.backward()
            collector.update()
        factors = collector.factors()
        with merit_fast.sketch_gradients(
            model, proj_dim=4096, normalize="kfac", factors=factors
        ) as sketcher:
            with torch.autocast("cpu", torch.bfloat16):
                loss = summed_loss(model, examples)
                if within:
                    loss.backward()
            if not within:
                loss.backward()
            results.append(sketcher.take())
    assert_close(results[1], results[0])


def test_a_convolution_of_patches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 2, stride=2), nn.Flatten(2), nn.Linear(4, 2))
    x = torch.randn(3, 3, 4, 4)
    with merit_fast.kfac_factors(model) as collector:
        model(x).square().sum().backward()
        collector.update()
    factors = collector.factors()
    assert factors.columns["0.weight"].shape == (1, 12, 12)
    with merit_fast.sketch_gradients(
        model, proj_dim=4096, normalize="kfac", factors=factors
    ) as sketcher:
        model(x).square().sum().backward()
        sketcher.take()
    assert sketcher.checked.row_error < 2e-5
