"""Updates in the backward pass under schedules, accumulation, clipping, loading and wrong uses."""

import copy

import pytest
import torch
from support.kernels.optimizer_runs import bits

from merit_fast.kernels.optimizer import FusedAdamW, SpentGradient


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 7), torch.nn.Linear(7, 3)
    )
    layers[2].weight = torch.nn.Parameter(layers[2].weight.detach().clone())
    return layers.to(dtype)


def loss_of(layers, step, part=0, scale=1.0):
    numbers = torch.Generator().manual_seed(100 * step + part)
    dtype = layers[0].weight.dtype
    rows = torch.randn(4, 5, generator=numbers).to(dtype)
    return layers(rows).float().square().sum() * scale


def scheduled(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def run(make, steps=5, parts=1, dtype=torch.float32, in_step=None):
    """Parameters after steps of ``parts`` passes under a schedule."""
    layers = model(dtype)
    optimizer, loop = make(layers)
    schedule = scheduled(optimizer)
    for step in range(steps):
        loop(layers, optimizer, step, parts)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return list(layers.parameters()), optimizer


def accumulate(layers, optimizer, step, parts):
    for part in range(parts):
        loss_of(layers, step, part, 1 / parts).backward()


def plain(**options):
    def make(layers):
        return FusedAdamW(layers.parameters(), lr=1e-2, **options), accumulate

    return make


def in_backward(loop=accumulate, clip=None, accumulation=1, **options):
    def make(layers):
        optimizer = FusedAdamW(layers.parameters(), lr=1e-2, **options)
        optimizer.step_in_backward(clip=clip, accumulation=accumulation)
        return optimizer, loop

    return make


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(bits(a), bits(b))


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
    """As at the end of an epoch, where a Trainer steps after the micro-batches that are left."""
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
