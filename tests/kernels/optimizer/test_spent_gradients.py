"""Updates in the backward pass refuse what comes too late, in words, and count their passes."""

import pytest
import torch
from support.kernels.backward_steps import accumulate, assert_equal, loss_of, model

from merit_fast.kernels.optimizer import FusedAdamW

WRONG = {
    "a clip that would change them": (
        lambda layers: torch.nn.utils.clip_grad_norm_(layers.parameters(), 1e-3),
        "cannot be multiplied by .*max_grad_norm=0",
    ),
    "a clip by value": (
        lambda layers: torch.nn.utils.clip_grad_value_(layers.parameters(), 1e-3),
        "has used and freed this gradient",
    ),
    "a second pass": (lambda layers: loss_of(layers, 1).backward(), "pass accumulation=N"),
    "a scaler": (lambda layers: unscale(layers), "GradScaler cannot unscale"),
    "a reader": (lambda layers: layers[0].weight.grad.abs(), "has used and freed this gradient"),
}


def unscale(layers):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.unscale_(torch.optim.SGD(layers.parameters()))


@pytest.mark.parametrize("name", WRONG)
def test_uses_of_spent_gradients_that_come_too_late_raise_in_words(name):
    act, words = WRONG[name]
    layers = model()
    optimizer = FusedAdamW(layers.parameters())
    optimizer.step_in_backward()
    loss_of(layers, 0).backward()
    after = [p.detach().clone() for p in layers.parameters()]
    with pytest.raises(RuntimeError, match=words):
        act(layers)
    assert_equal(after, list(layers.parameters()))
    optimizer.zero_grad()
    loss_of(layers, 1).backward()
    optimizer.step()


@pytest.mark.parametrize("foreach", [None, True, False])
def test_a_clip_that_changes_nothing_reads_the_true_norm(foreach):
    layers, twin = model(), model()
    optimizer = FusedAdamW(layers.parameters())
    optimizer.step_in_backward()
    loss_of(layers, 0).backward()
    loss_of(twin, 0).backward()
    for limit in (float("inf"), 1e9):
        norm = torch.nn.utils.clip_grad_norm_(layers.parameters(), limit, foreach=foreach)
        true = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters()])
        assert float(norm) == pytest.approx(float(true), rel=1e-6)


def test_views_of_a_spent_gradient_have_their_own_shape():
    layers = model()
    FusedAdamW(layers.parameters()).step_in_backward()
    loss_of(layers, 0).backward()
    spent = layers[0].weight.grad
    for view, shape in (
        (spent.view(-1), (35,)),
        (spent.flatten(), (35,)),
        (spent.detach(), (7, 5)),
    ):
        assert view.shape == shape and view.device == spent.device
        assert float(view.norm()) == float(spent.norm())


def test_more_passes_than_promised_and_a_missing_measure_raise():
    layers = model()
    optimizer = FusedAdamW(layers.parameters(), max_norm=1.0)
    with optimizer.step_in_backward(clip="two-pass") as layerwise:
        with pytest.raises(RuntimeError, match="needs a first pass inside measuring"):
            loss_of(layers, 0).backward()
        optimizer.zero_grad()
        with layerwise.measuring():
            loss_of(layers, 0).backward()
        loss_of(layers, 0).backward()
        optimizer.step()
    with optimizer.step_in_backward(clip="previous", accumulation=2) as layerwise:
        with pytest.raises(RuntimeError, match="measuring.. is for"), layerwise.measuring():
            pass
        for part in range(2):
            loss_of(layers, 0, part).backward()
        with pytest.raises(RuntimeError, match="accumulation"):
            loss_of(layers, 0, 2).backward()


def test_a_pass_that_broke_leaves_the_next_step_right():
    layers, twin = model(), model()
    ours = FusedAdamW(layers.parameters(), lr=1e-2, max_norm=0.5)
    ours.step_in_backward(clip="two-pass", accumulation=2)
    theirs = FusedAdamW(twin.parameters(), lr=1e-2, max_norm=0.5)

    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hidden = layers[0](torch.ones(2, 5))
        layers[1:](Break.apply(hidden)).sum().backward()
    ours.zero_grad()
    for each, optimizer in ((layers, ours), (twin, theirs)):
        accumulate(each, optimizer, 0, 2)
        optimizer.step()
    for a, b in zip(layers.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "arguments,options,words",
    [
        ({}, {"max_norm": 1.0}, "needs clip="),
        ({"clip": "previous"}, {}, "needs max_norm above 0"),
        ({"clip": "exact"}, {"max_norm": 1.0}, "clip must be None"),
        ({"accumulation": 0}, {}, "accumulation must be at least 1"),
        ({"clip": "previous"}, {"max_norm": 1.0, "skip_nonfinite": True}, "needs clip=.two-pass"),
        ({}, {"skip_nonfinite": True}, "needs clip=.two-pass"),
    ],
    ids=str,
)
def test_arguments_that_would_update_wrongly_are_refused(arguments, options, words):
    optimizer = FusedAdamW(model().parameters(), **options)
    with pytest.raises(ValueError, match=words):
        optimizer.step_in_backward(**arguments)


def test_hooks_are_not_set_twice():
    optimizer = FusedAdamW(model().parameters())
    with optimizer.step_in_backward(), pytest.raises(ValueError, match="is on already"):
        optimizer.step_in_backward()
    optimizer.step_in_backward().remove()


def test_two_optimizers_do_not_update_one_parameter_in_the_pass():
    layers = model()
    first, second = (FusedAdamW(layers.parameters()) for _ in range(2))
    with first.step_in_backward(), pytest.raises(ValueError, match="another optimizer updates"):
        second.step_in_backward()
    second.step_in_backward()
    third = FusedAdamW([torch.nn.Parameter(torch.ones(3))])
    third.step_in_backward()
    with pytest.raises(ValueError, match="another optimizer updates"):
        third.add_param_group({"params": list(layers.parameters())})
    assert len(third.param_groups) == 1


def test_a_step_with_a_nan_is_left_out_in_the_pass():
    layers = model()
    optimizer = FusedAdamW(layers.parameters(), lr=1e-2, max_norm=1.0, skip_nonfinite=True)
    optimizer.step_in_backward(clip="two-pass", accumulation=2)
    before = [p.detach().clone() for p in layers.parameters()]
    for part, scale in enumerate((1.0, float("nan"))):
        loss_of(layers, 0, part, scale).backward()
    optimizer.step()
    assert_equal(before, list(layers.parameters()))
    assert optimizer.num_skipped == 1
    accumulate(layers, optimizer, 1, 2)
    optimizer.step()
    assert optimizer.num_skipped == 1 and int(optimizer.state[layers[0].weight]["step"]) == 1
