"""Updates in the backward pass under schedules, accumulation, clipping, loading, new groups."""

import copy

import pytest
import torch
from support.kernels.backward_steps import (
    accumulate,
    assert_equal,
    in_backward,
    loss_of,
    model,
    plain,
    run,
    scheduled,
)

from merit_fast.kernels.optimizer import FusedAdamW, SpentGradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_schedules_and_accumulation_give_the_bits_of_plain_steps(parts, dtype):
    ours, _ = run(in_backward(accumulation=parts), parts=parts, dtype=dtype)
    theirs, _ = run(plain(), parts=parts, dtype=dtype)
    assert_equal(ours, theirs)


def test_options_are_those_of_the_groups_after_a_state_was_loaded():
    layers = model()
    optimizer = FusedAdamW(layers.parameters(), lr=1.0)
    optimizer.step_in_backward()
    optimizer.load_state_dict(optimizer.state_dict())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    before = [p.detach().clone() for p in layers.parameters()]
    loss_of(layers, 0).backward()
    optimizer.step()
    schedule.step()
    assert_equal(before, list(layers.parameters()))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    loss_of(layers, 0).backward()
    assert not any(torch.equal(a, b) for a, b in zip(before, layers.parameters(), strict=True))


def measured(layers, optimizer, step, parts):
    loss = loss_of(layers, step)
    with optimizer.layerwise.measuring():
        loss.backward(retain_graph=True)
    assert all(p.grad is None for p in layers.parameters())
    loss.backward()


def two_pass(**options):
    def make(layers):
        optimizer = FusedAdamW(layers.parameters(), lr=1e-2, **options)
        optimizer.layerwise = optimizer.step_in_backward(clip="two-pass")
        return optimizer, measured

    return make


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_two_passes_clip_as_a_plain_step(max_norm):
    theirs, plain_one = run(plain(max_norm=max_norm))
    ours, optimizer = run(two_pass(max_norm=max_norm))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)
    assert float(optimizer.grad_norm) == pytest.approx(float(plain_one.grad_norm), rel=1e-5)


def test_accumulated_gradients_are_clipped_by_their_own_norm_in_one_pass():
    theirs, _ = run(plain(max_norm=0.5), parts=2)
    ours, _ = run(in_backward(clip="two-pass", accumulation=2, max_norm=0.5), parts=2)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def test_a_parameter_that_was_unfrozen_is_measured_and_updated_once():
    layers, twin = model(), model()
    layers[0].weight.requires_grad_(False)
    optimizer = FusedAdamW(layers.parameters(), lr=1e-2, max_norm=0.5)
    optimizer.layerwise = optimizer.step_in_backward(clip="two-pass")
    layers[0].weight.requires_grad_(True)
    measured(layers, optimizer, 0, 1)
    optimizer.step()
    other = FusedAdamW(twin.parameters(), lr=1e-2, max_norm=0.5)
    loss_of(twin, 0).backward()
    other.step()
    assert float(optimizer.grad_norm) == pytest.approx(float(other.grad_norm), rel=1e-5)
    moments = [each.state[each.members()[0].parameter]["exp_avg"] for each in (optimizer, other)]
    assert torch.allclose(*moments, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_clip_by_the_previous_norm_is_that_of_torch_with_this_factor(parts):
    limit = 0.5
    ours, _ = run(in_backward(clip="previous", accumulation=parts, max_norm=limit), parts=parts)
    layers = model()
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = scheduled(optimizer)
    last = None
    for step in range(5):
        accumulate(layers, optimizer, step, parts)
        norm = torch.nn.utils.get_total_norm([p.grad for p in layers.parameters()])
        factor = min(1.0, limit / (float(norm if last is None else last) + 1e-6))
        for p in layers.parameters():
            p.grad.mul_(factor)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        last = norm
    for a, b in zip(ours, layers.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_resumed_run_clips_by_the_norm_before_the_break():
    def cut(layers):
        optimizer, loop = in_backward(clip="previous", max_norm=0.5)(layers)
        return optimizer, loop

    whole, _ = run(cut, steps=4)
    layers = model()
    first, _ = cut(layers)
    schedule = scheduled(first)
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy((first.state_dict(), schedule.state_dict(), layers.state_dict()))
            layers = model()
            layers.load_state_dict(saved[2])
            first, _ = cut(layers)
            schedule = scheduled(first)
            first.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
        loss_of(layers, step).backward()
        first.step()
        schedule.step()
        first.zero_grad()
    assert_equal(whole, list(layers.parameters()))


def test_a_step_after_fewer_passes_takes_what_is_there():
    """A Trainer does so at the end of an epoch, after the micro-batches that are left."""
    passes = [3, 3, 1, 3]

    def loop(layers, optimizer, step, parts):
        accumulate(layers, optimizer, step, passes[step])

    ours, _ = run(in_backward(loop, accumulation=3), steps=4)
    theirs, _ = run(lambda layers: (plain()(layers)[0], loop), steps=4)
    assert_equal(ours, theirs)


def test_groups_added_later_are_updated_in_the_pass_too():
    layers = model()
    first, *rest = layers.parameters()
    optimizer = FusedAdamW([first], lr=1e-2)
    optimizer.step_in_backward()
    optimizer.add_param_group({"params": rest, "lr": 0.0})
    loss_of(layers, 0).backward()
    assert all(isinstance(p.grad, SpentGradient) for p in (first, *rest))
    optimizer.step()
    assert all(p.grad is None for p in (first, *rest))
    assert int(optimizer.state[rest[0]]["step"]) == 1


def test_parameters_that_replaced_others_are_updated_by_step():
    """accelerate puts other parameters into the groups; their hooks come with the next step."""
    layers = model()
    optimizer = FusedAdamW(layers.parameters(), lr=1e-2)
    optimizer.step_in_backward()
    new = copy.deepcopy(layers)
    optimizer.param_groups[0]["params"] = list(new.parameters())
    before = [p.detach().clone() for p in new.parameters()]
    for spent in (False, True):
        loss_of(new, 0).backward()
        assert isinstance(new[0].weight.grad, SpentGradient) == spent
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, new.parameters(), strict=True))
    assert int(optimizer.state[new[0].weight]["step"]) == 2
