"""FusedAdamW against torch and float64, with every option."""

import pytest
import torch
from support.checks import run_at_level
from support.kernels.optimizer_runs import (
    BACKENDS,
    OPTIONS,
    SETTINGS,
    assert_same_run,
    make_parameters,
    set_gradients,
    train,
)
from support.paths import TESTS

from merit_fast.kernels.optimizer import FusedAdamW, _eager

BOTH = pytest.mark.parametrize("backend", BACKENDS)
native = pytest.mark.skipif("cpu" not in BACKENDS, reason="the native kernels were not built")
EVERY = pytest.mark.parametrize("dtype,options", OPTIONS, ids=str)


def errors(parameters, truth):
    return [
        float((a.detach().double() - b.detach()).norm())
        for a, b in zip(parameters, truth, strict=True)
        if a.numel()
    ]


def in_double(steps, **options):
    """torch's AdamW in float64 from the same numbers."""
    parameters = [torch.nn.Parameter(p.detach().double()) for p in make_parameters("fp32")]
    optimizer = torch.optim.AdamW(parameters, **{**SETTINGS, **options})
    shadows = make_parameters("fp32")
    for step in range(steps):
        set_gradients(shadows, step)
        for parameter, shadow in zip(parameters, shadows, strict=True):
            parameter.grad = shadow.grad.double()
        optimizer.step()
    return [p.detach() for p in parameters]


@native
@EVERY
def test_the_native_kernel_gives_the_bits_of_eager(dtype, options):
    exact = "max_norm" not in options  # sums of another order
    assert_same_run(
        train(dtype, backend="cpu", **options), train(dtype, backend="eager", **options), exact
    )


@BOTH
@pytest.mark.parametrize(
    "options", [{}, {"betas": (0.0, 0.99)}, {"betas": (0.3, 0.5), "eps": 1e-4, "lr": 0.1}], ids=str
)
def test_twenty_fp32_steps_are_no_further_from_float64_than_torchs(backend, options):
    truth = in_double(20, **options)
    ours, _ = train("fp32", 20, backend=backend, **options)
    torchs, _ = train("fp32", 20, make=torch.optim.AdamW, fused=True, **options)
    floor = [2e-7 * float(t.norm()) for t in truth if t.numel()]
    for mine, theirs, rest in zip(errors(ours, truth), errors(torchs, truth), floor, strict=True):
        assert mine <= theirs + rest


@BOTH
@pytest.mark.parametrize("dtype,options", [
    ("bf16", {"rounding": "nearest", "moments": "bf16"}),
    ("bf16", {"rounding": "nearest"}),
    ("bf16", {"master": "fp32"}),
    ("bf16", {"master": "split"}),
], ids=str)  # fmt: skip
def test_one_bf16_step_is_no_further_from_float64_than_torchs(backend, dtype, options):
    ours, _ = train(dtype, 1, backend=backend, **options)
    torchs, _ = train(dtype, 1, make=torch.optim.AdamW, fused=True)
    exact = [torch.nn.Parameter(p.detach().double()) for p in make_parameters(dtype)]
    shadows = make_parameters(dtype)
    set_gradients(shadows, 0)
    for parameter, shadow in zip(exact, shadows, strict=True):
        parameter.grad = shadow.grad.double()
    torch.optim.AdamW(exact, **SETTINGS).step()
    for mine, theirs in zip(errors(ours, exact), errors(torchs, exact), strict=True):
        assert mine <= theirs * 1.001


@BOTH
@pytest.mark.parametrize("options,share", [
    ({}, 1.0), ({"moments": "bf16"}, 1.0), ({"moments": "int8"}, 1.0), ({"master": "fp32"}, 1.0),
    ({"master": "split"}, 1.0), ({"master": "split8", "moments": "int8"}, 1.0),
    ({"rounding": "nearest"}, None),
], ids=str)  # fmt: skip
def test_twenty_steps_of_lr_1e_5_move_bf16_weights_as_they_move_fp32(backend, options, share):
    torch.manual_seed(1)
    weight = torch.nn.Parameter((torch.randn(256, 256) * 0.02).bfloat16())
    start = weight.detach().double()
    optimizer = FusedAdamW([weight], lr=1e-5, backend=backend, **options)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    state = optimizer.state[weight]
    end = _eager.full_weight(weight.detach(), state.get("master", state.get("low_bits")))
    move = float((start - end.double()).mean()) / 2e-4
    assert move < 0.5 if share is None else abs(move - share) < 0.02


@BOTH
def test_another_seed_rounds_differently_and_the_same_seed_alike(backend):
    runs = [train("bf16", backend=backend, seed=seed)[0] for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][3], runs[2][3])


@BOTH
@pytest.mark.parametrize("max_norm", [0.5, 1e6, float("inf")])
def test_a_clip_is_clip_grad_norm_then_a_step(backend, max_norm):
    ours, optimizer = train("fp32", 5, backend=backend, max_norm=max_norm)
    theirs = make_parameters("fp32")
    reference = torch.optim.AdamW(theirs, **SETTINGS)
    for step in range(5):
        set_gradients(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        reference.step()
    assert optimizer.grad_norm.dtype == torch.float64
    assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@BOTH
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_only_measured_changes_no_weight(backend, bad):
    runs = []
    for max_norm in (0.0, float("inf")):
        parameters = make_parameters("fp32")
        optimizer = FusedAdamW(parameters, **SETTINGS, backend=backend, max_norm=max_norm)
        set_gradients(parameters, 0)
        parameters[3].grad[5, 7] = bad
        optimizer.step()
        runs.append((parameters, optimizer))
    assert_same_run(*runs)
    assert not optimizer.grad_norm.isfinite() and runs[1][0][2].isfinite().all()


@BOTH
@pytest.mark.parametrize("decay", [0.0, 0.75, "mean"])
def test_the_average_is_that_of_all_weights_so_far(backend, decay):
    parameters, optimizer = train("bf16", 1, backend=backend, average_decay=decay)
    expected = [p.detach().double() for p in parameters]
    count = 1
    for step in range(1, 6):
        train("bf16", 1, step, parameters, optimizer)
        share = 1 / (count + 1) if decay == "mean" else 1 - decay
        expected = [
            e + (p.detach().double() - e) * share for e, p in zip(expected, parameters, strict=True)
        ]
        count += 1
    for parameter, truth in zip(parameters, expected, strict=True):
        average = optimizer.state[parameter]["average"]
        assert average.dtype == torch.float32 and torch.allclose(
            average.double(), truth, rtol=1e-6, atol=1e-8
        )


@BOTH
@pytest.mark.parametrize("zero_grad", [False, True])
def test_gradients_are_zeroed_in_place_or_left(backend, zero_grad):
    parameters, _ = train("bf16", 1, backend=backend, zero_grad=zero_grad, max_norm=0.1)
    fresh = make_parameters("bf16")
    set_gradients(fresh, 0)
    for parameter, untouched in zip(parameters, fresh, strict=True):
        expected = torch.zeros_like(untouched) if zero_grad else untouched.grad
        assert torch.equal(parameter.grad, expected)


@native
def test_results_do_not_depend_on_threads():
    before = torch.get_num_threads()
    runs = []
    gradients = [torch.randn(50_001), torch.randn(16_384), torch.randn(33)]
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        runs.append(
            train("bf16", gradients=gradients, moments="int8", max_norm=1.0, average_decay=0.9)
        )
    torch.set_num_threads(before)
    assert_same_run(runs[0], runs[1])
    assert_same_run(runs[0], runs[2])


@native
def test_every_level_gives_the_same_bits(native_levels):
    script = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
import hashlib, torch
from support.kernels.optimizer_runs import bits, train
digest = hashlib.sha256()
for dtype, options in (("fp32", {{}}), ("bf16", {{"moments": "int8", "max_norm": 0.1}}),
                       ("bf16", {{"moments": "bf16"}}),
                       ("bf16", {{"master": "split", "average_decay": 0.9}}),
                       ("bf16", {{"master": "fp32"}}),
                       ("bf16", {{"master": "split8", "moments": "int8"}}),
                       ("bf16", {{"rounding": "nearest"}})):
    parameters, optimizer = train(dtype, backend="cpu", **options)
    for p in parameters:
        for value in (p, *optimizer.state[p].values()):
            if torch.is_tensor(value):
                digest.update(bits(value.detach()).contiguous().numpy().tobytes())
print(digest.hexdigest())
"""
    assert (
        len({run_at_level(script, level) for level in native_levels if level != "avx512_bf16"}) == 1
    )
