"""FusedAdamW: against torch and float64, every option, odd inputs."""

import pytest
import torch
from support.checks import run_at_level
from support.optimizer_runs import (
    BACKENDS,
    OPTIONS,
    SETTINGS,
    assert_same_run,
    make_parameters,
    set_gradients,
    train,
)
from support.paths import TESTS

from merit_fast.kernels import dispatch
from merit_fast.kernels.optimizer import FusedAdamW, _eager, _ops

BOTH = pytest.mark.parametrize("backend", BACKENDS)
native = pytest.mark.skipif("cpu" not in BACKENDS, reason="the native kernels were not built")
EVERY = pytest.mark.parametrize("dtype,options", OPTIONS, ids=str)


def errors(parameters, truth):
    return [
        float((a.double() - b).norm()) for a, b in zip(parameters, truth, strict=True) if a.numel()
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
    ({"master": "split"}, 1.0),
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
@pytest.mark.parametrize("decay", [0.0, 0.75, "mean"])
def test_the_average_is_that_of_all_weights_so_far(backend, decay):
    parameters, optimizer = train("bf16", 1, backend=backend, average_decay=decay)
    expected, count = [p.detach().double() for p in parameters], 1
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
from support.optimizer_runs import bits, train
digest = hashlib.sha256()
for dtype, options in (("fp32", {{}}), ("bf16", {{"moments": "int8", "max_norm": 0.1}}),
                       ("bf16", {{"moments": "bf16"}}), ("bf16", {{"master": "split", "average_decay": 0.9}}),
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


@BOTH
def test_schedulers_and_groups_have_their_own_rates(backend):
    results = []
    for make in (FusedAdamW, torch.optim.AdamW):
        parameters = make_parameters("fp32")
        groups = [
            {"params": parameters[:2], "weight_decay": 0.3},
            {"params": parameters[2:], "lr": 0.1, "betas": (0.5, 0.9)},
        ]
        extra = {"backend": backend} if make is FusedAdamW else {}
        optimizer = make(groups, **SETTINGS, **extra)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(6):
            set_gradients(parameters, step)
            optimizer.step()
            schedule.step()
        results.append(parameters)
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@BOTH
def test_step_returns_the_closures_loss_and_skips_parameters_without_gradient(backend):
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([used, unused], lr=0.1, backend=backend)

    def closure():
        loss = (used**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 3.0
    assert torch.allclose(used, torch.full((3,), 0.9)) and torch.equal(unused, torch.ones(3))
    assert unused not in optimizer.state
    FusedAdamW([unused], max_norm=1.0, backend=backend).step()  # no gradient at all


LAYOUTS = {
    "transposed": lambda: torch.randn(20, 30).t(),
    "channels last": lambda: torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    "with gaps": lambda: torch.randn(20, 60)[:, ::2],
    "a view of a larger buffer": lambda: torch.randn(1000)[37:137].view(10, 10),
}


@BOTH
@pytest.mark.parametrize(
    "options", [{}, {"moments": "int8", "zero_grad": True, "max_norm": 1.0}], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("same", [True, False], ids=["grad alike", "grad contiguous"])
def test_any_layout_of_weights_and_gradients(backend, layout, options, same):
    weight = torch.nn.Parameter(LAYOUTS[layout]())
    plain = torch.nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    ours = FusedAdamW([weight], lr=1e-2, backend=backend, **options)
    reference = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        gradient = torch.randn(weight.shape)
        weight.grad = torch.empty_like(weight).copy_(gradient) if same else gradient.clone()
        plain.grad = gradient
        if "max_norm" in options:
            torch.nn.utils.clip_grad_norm_([plain], 1.0)
        ours.step()
        reference.step()
        assert not options or not weight.grad.any()
    limit = 0.1 if "moments" in options else 1e-5
    assert (weight - plain).norm() <= limit * 3e-2 * plain.numel() ** 0.5


@BOTH
def test_flat_buffers_may_hold_many_parameters_but_none_may_overlap(backend):
    buffer = torch.randn(100)
    parts = [torch.nn.Parameter(buffer[:40]), torch.nn.Parameter(buffer[40:])]
    optimizer = FusedAdamW(parts, lr=0.1, backend=backend)
    for part in parts:
        part.grad = torch.ones_like(part)
    before = buffer.clone()
    optimizer.step()
    assert torch.allclose(buffer, before - 0.1)
    with pytest.raises(ValueError, match="must not overlap in memory"):
        FusedAdamW([torch.nn.Parameter(buffer[:40]), torch.nn.Parameter(buffer[30:])])


@BOTH
def test_a_step_counts_as_a_change_for_autograd(backend):
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    FusedAdamW([weight], backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_wrong_arguments_are_refused_by_name():
    weight = torch.nn.Parameter(torch.ones(3))
    for options, words in (
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"betas": (1.0, 0.9)}, "betas must be from 0 to below 1"),
        ({"rounding": "up"}, "rounding must be one of stochastic, nearest, got 'up'"),
        ({"master": "bf16"}, "master must be one of none, fp32, split"),
        ({"moments": "fp8"}, "moments must be one of fp32, bf16, int8"),
        (
            {"average_decay": 1.0},
            "average_decay must be None, 'mean' or from 0 to below 1, got 1.0",
        ),
        ({"max_norm": -1.0}, "max_norm must be at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            FusedAdamW([weight], **options)
    for dtype in (torch.complex64, torch.float16, torch.float64):
        with pytest.raises(TypeError, match="parameters must be float32 or bfloat16"):
            FusedAdamW([torch.nn.Parameter(torch.ones(3, dtype=dtype))])
    weight.grad = torch.ones(3).to_sparse()
    with pytest.raises(
        ValueError, match=r"gradients must be dense, got torch.sparse_coo of shape \[3\]"
    ):
        FusedAdamW([weight]).step()
    with pytest.raises(dispatch.BackendUnavailableError, match="adamw: backend 'triton'"):
        weight.grad = torch.ones(3)
        FusedAdamW([weight], backend="triton").step()


@BOTH
def test_the_ops_are_well_formed(backend):
    weights, grads, moments = ([torch.randn(5), torch.randn(3, 4)] for _ in range(3))
    seconds = [m.square() for m in moments]
    rates, keys, numbers = [1e-2, 1.0, 0.0] * 2, [0, 1], [1.0, 0.9, 0.99, 1e-8]
    lists = (weights, grads, moments, seconds, [], [], [])
    torch.library.opcheck(_ops.adamw, (*lists, None, rates, keys, numbers, True, False, backend))
    torch.library.opcheck(_ops.grad_square_sum, (grads, backend))


@native
def test_columns_of_another_length_are_refused():
    names = ("weights", "grads", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales")
    columns = {name: [0] for name in (*names, "masters", "averages", "keys")}
    columns |= {name: [0.0] for name in ("rates", "roots", "average_weights")}
    for name, column in columns.items():
        with pytest.raises(ValueError, match=f"adamw: {name} must have 1 entries, has 2"):
            dispatch.native().AdamWTensors(sizes=[1], **{**columns, name: column * 2})
