"""FusedAdamW's inputs: groups and schedulers, closures, layouts, overlaps, wrong arguments."""

import pytest
import torch
from support.kernels.optimizer_runs import BACKENDS, SETTINGS, make_parameters, set_gradients

from merit_fast.kernels import dispatch
from merit_fast.kernels.optimizer import FusedAdamW, _ops

BOTH = pytest.mark.parametrize("backend", BACKENDS)


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
    used = torch.nn.Parameter(torch.ones(3))
    unused = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([used, unused], lr=0.1, backend=backend)

    def closure():
        loss = (used**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 3.0
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


def test_a_step_that_is_refused_counts_for_no_parameter():
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = FusedAdamW(parameters, average_decay=0.9)
    parameters[0].grad = torch.ones(3)
    parameters[1].grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="gradients must be dense"):
        optimizer.step()
    parameters[1].grad = torch.ones(3)
    optimizer.step()
    states = [optimizer.state[p] for p in parameters]
    assert [(float(s["step"]), s["num_averaged"]) for s in states] == [(1.0, 1)] * 2


@BOTH
def test_flat_buffers_may_hold_many_parameters_but_none_may_overlap(backend):
    buffer = torch.randn(100)
    slices = [torch.nn.Parameter(buffer[:40]), torch.nn.Parameter(buffer[40:])]
    optimizer = FusedAdamW(slices, lr=0.1, backend=backend)
    for parameter in slices:
        parameter.grad = torch.ones_like(parameter)
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
    rates = [1e-2, 1.0, 0.0] * 2
    keys = [0, 1]
    numbers = [1.0, 0.9, 0.99, 1e-8]
    lists = (weights, grads, moments, seconds, [], [], [])
    torch.library.opcheck(
        _ops.adamw, (*lists, None, rates, keys, [0] * len(keys), numbers, True, False, backend)
    )
    torch.library.opcheck(_ops.grad_square_sum, (grads, backend))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native kernels were not built")
def test_columns_of_another_length_are_refused():
    names = ("weights", "grads", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales")
    columns = {name: [0] for name in (*names, "masters", "averages", "keys", "firsts")}
    columns |= {name: [0.0] for name in ("rates", "roots", "average_weights")}
    for name, column in columns.items():
        with pytest.raises(ValueError, match=f"adamw: {name} must have 1 entries, has 2"):
            dispatch.native().AdamWTensors(sizes=[1], **{**columns, name: column * 2})


def test_options_of_the_optimizer_are_refused_in_groups():
    """torch takes any name in a group; nothing would read these."""
    groups = [{"params": make_parameters("fp32"), "max_norm": 1.0}]
    with pytest.raises(ValueError, match="max_norm is an option of the optimizer, not of a group"):
        FusedAdamW(groups)
    same = FusedAdamW(groups, max_norm=1.0)
    assert "max_norm" not in same.param_groups[0]
