"""The self-check: sketches are compared with autograd, and wrong ones are named or replaced."""

import pytest
import torch
from support.checks import assert_close
from support.sketch.exact_gradients import (
    SKETCH,
    ragged_examples,
    summed_loss,
    tiny,
)
from support.sketch.odd_modules import Calls, TimeFirst
from support.sketch.self_checks import exact_rows, loss_of, made, sketched
from torch import nn

import merit_fast
from merit_fast.errors import InputError, MeritFastError
from merit_fast.sketch.capture import coverage
from merit_fast.sketch.capture.layout import RepeatBatch
from merit_fast.sketch.gradients import GradientSketcher


class Wrong(nn.Module):
    """A linear layer between others; tests break its formula."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.after = nn.Linear(6, 3)

    def forward(self, x):
        return self.after(self.norm(self.before(x)).tanh())


def break_norms(monkeypatch, change):
    real = coverage.affine_backward

    def broken(unit, epsilon, site, run, dy, x):
        real(unit, epsilon, site, run, change(dy), x)

    monkeypatch.setattr(coverage, "affine_backward", broken)


FAULTS = {
    "row": lambda dy: 1.001 * dy,
    "division": lambda dy: dy.flip(0),  # the sum over the examples is right
    "sum": lambda dy: torch.cat([2 * dy[:1], dy[1:]]),  # the last example is right
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_formula_is_named(monkeypatch, fault):
    break_norms(monkeypatch, FAULTS[fault])
    torch.manual_seed(0)
    model = Wrong()
    with (
        GradientSketcher(model, SKETCH) as sketcher,
        pytest.raises(
            MeritFastError,
            match=r"parameter norm.(weight|bias) of LayerNorm fails the check: "
            + ("the sum of the examples' sketches" if fault == "sum" else "the sketch of one"),
        ),
    ):
        sketched(sketcher, model, torch.randn(3, 5, 6))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_formula_is_replaced_by_a_backward_pass_per_example(monkeypatch, fault):
    break_norms(monkeypatch, FAULTS[fault])
    model = made(Wrong)
    x = torch.randn(3, 5, 6)
    truth = exact_rows(Wrong, x)
    lines = []
    with GradientSketcher(model, SKETCH, uncovered="autograd", notify=lines.append) as sketcher:
        if fault == "sum":
            with pytest.raises(RepeatBatch, match="run this batch again"):
                sketched(sketcher, model, x)
        assert_close(sketched(sketcher, model, x), truth)
        assert_close(sketched(sketcher, model, x[:1]), truth[:1])
    assert sketcher.slow_parameters.keys() == {"norm.weight", "norm.bias"}
    assert len(lines) == 1 and "2 of 6 parameters (" in lines[0]
    assert "fails the check" in sketcher.slow_parameters["norm.weight"]


def test_never_checks_nothing(monkeypatch):
    break_norms(monkeypatch, FAULTS["row"])
    model = Wrong()
    with GradientSketcher(model, SKETCH, check="never") as sketcher:
        sketched(sketcher, model, torch.randn(3, 5, 6))
    assert sketcher.checked is None


def test_every_kind_of_call_is_checked_once():
    model = made(Wrong)
    with GradientSketcher(model, SKETCH) as sketcher:
        kinds = []
        for shape in ((4, 5, 6), (4, 7, 6), (5, 5, 6), (1, 5, 6), (4, 1, 6), (4, 9, 6)):
            sketched(sketcher, model, torch.randn(shape))
            kinds.append(sketcher.checked.kinds)
        assert kinds == [1, 1, 2, 3, 4, 4]  # B = T, B = 1, T = 1
        model.train()
        sketched(sketcher, model, torch.randn(4, 5, 6))
        assert sketcher.checked.kinds == 5
    with GradientSketcher(model, SKETCH, check="always") as sketcher:
        for _ in range(2):
            sketched(sketcher, model, torch.randn(4, 5, 6))
    assert sketcher.checked.kinds == 2 and sketcher.checked.sum_error < 2e-6
    assert sketcher.checked.row_error < 2e-6
    assert str(sketcher.checked).startswith("checked against autograd: ")


def test_a_module_that_is_wrong_at_coincident_sizes_only_is_found_when_they_come():
    torch.manual_seed(0)
    model = Calls(TimeFirst())
    with GradientSketcher(model, SKETCH) as sketcher:
        sketched(sketcher, model, torch.randn(1, 4, 6))  # one example: nothing to divide
        with pytest.raises(MeritFastError, match="inner.linear.[a-z]+ of Linear fails the check"):
            sketched(sketcher, model, torch.randn(4, 4, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(9, 14, 5), (9,)], ids=["batch", "one"])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma3"])
def test_sound_models_pass(architecture, lengths, dtype):
    model = tiny(architecture, tied=True).to(dtype)
    with GradientSketcher(model, SKETCH) as sketcher:
        summed_loss(model, ragged_examples(lengths)).backward()
        sketcher.take()
    limit = 2e-6 if dtype == torch.float32 else 2e-2
    assert sketcher.checked.row_error < limit and sketcher.checked.sum_error < limit
    assert sketcher.slow_parameters == {}


def test_long_rows_in_bf16_pass_though_autograd_sums_badly():
    model = tiny("qwen2", tied=True).bfloat16()
    ids = 3 + torch.randint(0, 7, (8, 200))  # often repeated: long sums in the embedding
    with GradientSketcher(model, SKETCH) as sketcher:
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        sketcher.take()
    assert sketcher.slow_parameters == {} and sketcher.checked.kinds == 1


def test_a_scalar_output_needs_batches_of_one():
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Wrong()

        def forward(self, x):
            return loss_of(self.inner(x))

    model = Scalar()
    x = torch.randn(3, 5, 6)
    with GradientSketcher(model, SKETCH) as sketcher:
        with pytest.raises(MeritFastError, match="'output', one number for 3 examples"):
            model(x).backward()
        sketcher.discard()
        model(x[:1]).backward()
        sketcher.take()
        assert sketcher.checked.row_error < 2e-6


def test_a_gradient_that_is_not_finite_is_returned_as_it_is():
    """The check cannot compare it, so it compares the next pass."""
    model = made(Wrong)
    x = torch.randn(3, 5, 6)
    bad = x.clone()
    bad[1] = torch.inf
    with GradientSketcher(model, SKETCH) as sketcher:
        result = sketched(sketcher, model, bad)
        assert [bool(row.isfinite().all()) for row in result] == [True, False, True]
        assert sketcher.checked is None
        sketched(sketcher, model, x)
        assert sketcher.checked.kinds == 1


def test_a_loss_that_reaches_weights_past_the_models_outputs_is_named():
    model = Wrong()
    with (
        GradientSketcher(model, SKETCH) as sketcher,
        pytest.raises(MeritFastError, match="parameter after.weight of Linear fails the check"),
    ):
        loss = loss_of(model(torch.randn(3, 5, 6))) + model.after.weight.square().sum()
        loss.backward()
        sketcher.take()


def test_gradients_and_flags_of_the_user_stay():
    model = Wrong()
    model.norm.bias.requires_grad_(False)
    model.after.weight.grad = torch.full((3, 6), 2.0)
    kept = model.after.weight.grad
    with GradientSketcher(model, SKETCH, check="always") as sketcher:
        sketched(sketcher, model, torch.randn(3, 5, 6))
        assert not any(p.requires_grad for p in model.parameters())
    assert model.after.weight.grad is kept and bool((kept == 2).all())
    assert model.before.weight.grad is None
    assert [p.requires_grad for p in model.norm.parameters()] == [True, False]


def test_extra_passes_are_at_most_two_and_only_once():
    model = tiny("llama")
    examples = ragged_examples()
    passes = []
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: (
            output.requires_grad_().register_hook(passes.append)
            if not output.requires_grad
            else output.register_hook(passes.append) and None
        )
    )
    with GradientSketcher(model, SKETCH) as sketcher:
        counts = []
        for _ in range(3):
            summed_loss(model, examples).backward()
            sketcher.take()
            counts.append(len(passes))
    assert counts[0] <= 3 and counts[2] - counts[1] == 1


def test_packed_rows_are_checked():
    model = tiny("llama")
    ids = torch.randint(1, 97, (1, 12))
    positions = torch.tensor([[*range(5), *range(7)]])
    with GradientSketcher(model, SKETCH) as sketcher:
        sketcher.packed(torch.tensor([0, 5, 12]))
        model(
            input_ids=ids, position_ids=positions, use_cache=False
        ).logits.square().sum().backward()
        sketcher.take()
    assert sketcher.checked.row_error < 2e-6 and sketcher.slow_parameters == {}


@pytest.mark.parametrize("option", ["check", "uncovered"])
def test_unknown_values_of_the_options_are_refused(option):
    with pytest.raises(InputError, match=f"{option}: must be one of '.*', got 'sometimes'"):
        merit_fast.sketch_gradients(tiny("llama"), 4096, **{option: "sometimes"})
