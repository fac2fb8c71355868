"""Sketches of modules that no hook covers as such: exact, or refused."""

import pytest
import torch
from support.checks import assert_close
from support.sketch.exact_gradients import (
    SKETCH,
    exact_sketches,
    hook_sketches,
    ragged_examples,
    sketch_of_loss,
    summed_loss,
    tiny,
)
from support.sketch.odd_modules import ODD, Calls, Chance
from support.sketch.self_checks import exact_rows, loss_of, made, sketched
from torch import nn

import merit_fast
from merit_fast.errors import MeritFastError
from merit_fast.sketch.capture.layout import Pass
from merit_fast.sketch.gradients import GradientSketcher
from merit_fast.sketch.precondition import Preconditioner


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("tokens", [5, 3, 1])
@pytest.mark.parametrize("name", ODD)
def test_odd_modules_are_exact(name, tokens):
    """With 3 tokens, rows of the 3 examples can be taken for tokens."""
    model = made(ODD[name])
    x = torch.randn(3, tokens, 6)
    truth = exact_rows(ODD[name], x)
    with GradientSketcher(model, SKETCH, uncovered="autograd") as sketcher:
        for row, exact in zip(sketched(sketcher, model, x), truth, strict=True):
            assert_close(row, exact)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ODD)
def test_odd_modules_are_exact_or_refused_by_default(name):
    model = made(ODD[name])
    x = torch.randn(3, 3, 6)
    truth = exact_rows(ODD[name], x)
    try:
        with GradientSketcher(model, SKETCH) as sketcher:
            result = sketched(sketcher, model, x)
    except MeritFastError as error:
        assert "parameter inner." in str(error) and "uncovered='autograd'" in str(error)
    else:
        assert_close(result, truth)


def test_chance_of_a_module_is_that_of_its_only_run():
    torch.manual_seed(0)
    model = Calls(Chance()).train()
    x = torch.randn(3, 5, 6)
    torch.manual_seed(1)
    output = model(x)
    gradients = [
        torch.autograd.grad(loss_of(output[b : b + 1]), list(model.parameters()), retain_graph=True)
        for b in range(3)
    ]
    parameters = dict(model.named_parameters())
    with GradientSketcher(model, SKETCH) as sketcher:
        torch.manual_seed(1)
        result = sketched(sketcher, model, x)
    run = Pass(SKETCH, Preconditioner(), 3, 5)
    for example, row in enumerate(gradients):
        for name, gradient in zip(parameters, row, strict=True):
            run.add(name, example, gradient)
    assert_close(result, run.out("", torch.device("cpu")))


def test_slow_parameters_of_a_scalar_need_batches_of_one():
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Calls(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))

        def forward(self, x):
            return loss_of(self.inner(x))

    model = Scalar()
    x = torch.randn(2, 5, 6)
    exact = sketch_of_loss(model, lambda: model(x[:1]))
    with GradientSketcher(model, SKETCH, uncovered="autograd", notify=str) as sketcher:
        with pytest.raises(MeritFastError, match="one number for 2 examples"):
            model(x).backward()
        sketcher.discard()
        model(x[:1]).backward()
        assert_close(sketcher.take(), exact)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_slow_parameters_under_checkpointing(reentrant):
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = nn.utils.parametrizations.weight_norm(
        model.model.layers[0].mlp.up_proj
    )
    examples = ragged_examples()
    exact = exact_sketches(model, examples)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    with GradientSketcher(model, SKETCH, uncovered="autograd", notify=str) as sketcher:
        for _ in range(2):
            summed_loss(model, examples).backward()
            assert_close(sketcher.take(), exact)
    assert all("parametrizations" in name for name in sketcher.slow_parameters)
    assert len(sketcher.slow_parameters) == 2


def test_a_scale_of_one_channel_and_a_wrapped_model_have_one_name():
    model = made(ODD["one-scale"])
    x = torch.randn(3, 5, 6)
    plain = exact_rows(ODD["one-scale"], x)

    class Compiled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

        def forward(self, x):
            return self._orig_mod(x)

    outer = nn.Sequential(Compiled(model.before), Compiled(model.inner), Compiled(model.after))
    with GradientSketcher(Compiled(outer), SKETCH) as sketcher:
        assert sketcher.parameter_names[:2] == ["0.weight", "0.bias"]
    model.inner = Compiled(model.inner)
    wrapped = Compiled(model)
    with GradientSketcher(wrapped, SKETCH) as sketcher:
        assert_close(sketched(sketcher, wrapped, x), plain)
        assert "inner.weight" in sketcher.parameter_names


def test_hook_sketches_agree_with_the_model_uncompiled():
    model = tiny("llama")
    examples = ragged_examples()
    plain = hook_sketches(model, examples)
    compiled = torch.compile(model, backend="eager")
    with merit_fast.sketch_gradients(compiled, 4096, seed=7) as sketcher:
        summed_loss(compiled, examples).backward()
        assert_close(sketcher.take(), plain)
        assert sketcher.parameter_names == [name for name, _ in model.named_parameters()]
