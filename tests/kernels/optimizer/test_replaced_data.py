"""FusedAdamW where the data of parameters is replaced after a step: layouts, shapes, dtypes."""

import copy

import pytest
import torch
from support.kernels.optimizer_runs import BACKENDS, bits

from merit_fast.kernels.optimizer import FusedAdamW, _eager

BOTH = pytest.mark.parametrize("backend", BACKENDS)
SHAPE = (6, 5, 7, 4)
OPTIONS = [
    (torch.float32, {"average_decay": 0.5}),
    (torch.bfloat16, {"moments": "bf16"}),
    (torch.bfloat16, {"master": "fp32"}),
    (torch.bfloat16, {"master": "split"}),
    (torch.bfloat16, {"master": "split8"}),
    (torch.float32, {"moments": "int8"}),
]
EVERY = pytest.mark.parametrize("dtype,options", OPTIONS, ids=str)


def parameter(dtype=torch.float32):
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return torch.nn.Parameter(values.to(dtype))


def train(weight, optimizer, steps):
    for step in steps:
        gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))
        weight.grad = torch.empty_like(weight).copy_(gradient)
        optimizer.step()


def made(weight, options, backend=None):
    return FusedAdamW([weight], lr=1e-2, rounding="nearest", backend=backend, **options)


def assert_same(ours, theirs, options):
    """Steps are equal to the bit; 8-bit moments form other blocks in another order of elements."""
    if options.get("moments") == "int8":
        assert (ours - theirs).norm() < 0.02 * 1e-2 * ours.numel() ** 0.5
    else:
        assert torch.equal(bits(ours), bits(theirs))


@BOTH
@EVERY
def test_states_follow_a_parameter_into_another_order_of_elements(backend, dtype, options):
    ours, theirs = parameter(dtype), parameter(dtype)
    optimizer, other = (made(weight, options, backend) for weight in (ours, theirs))
    for steps, layout in (
        ((0, 1), torch.channels_last),
        ((2,), torch.contiguous_format),
        ((3, 4), torch.contiguous_format),
    ):
        train(ours, optimizer, steps)
        train(theirs, other, steps)
        ours.data = ours.data.contiguous(memory_format=layout)
    assert_same(ours.detach(), theirs.detach(), options)
    for name, value in other.state[theirs].items():
        if torch.is_tensor(value) and value.dim() == 4 and "moments" not in options:
            assert torch.equal(bits(optimizer.state[ours][name]), bits(value))


@EVERY
def test_states_load_into_a_parameter_of_another_order_of_elements(dtype, options):
    theirs = parameter(dtype)
    other = made(theirs, options)
    train(theirs, other, range(2))
    ours = torch.nn.Parameter(theirs.detach().contiguous(memory_format=torch.channels_last))
    optimizer = made(ours, options)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    train(theirs, other, range(2, 4))
    train(ours, optimizer, range(2, 4))
    assert_same(ours.detach(), theirs.detach(), options)


@pytest.mark.parametrize("options", [{}, {"moments": "int8"}], ids=str)
def test_data_of_another_shape_is_refused(options):
    """The kernels would write past the end of the state."""
    weight = torch.nn.Parameter(torch.ones(300))
    optimizer = FusedAdamW([weight], **options)
    weight.grad = torch.ones(300)
    optimizer.step()
    for shape in ((600,), (30, 10)):
        weight.data = torch.ones(shape)
        weight.grad = torch.ones(shape)
        with pytest.raises(ValueError, match=r"its state of shape \[300\] on cpu"):
            optimizer.step()
    assert int(optimizer.state[weight]["step"]) == 1


@pytest.mark.parametrize("master", ["fp32", "split", "split8"])
def test_weights_that_became_bf16_get_a_master(master):
    weight = torch.nn.Parameter(torch.ones(64))
    optimizer = FusedAdamW([weight], lr=1e-4, master=master)
    for step in range(21):
        if step == 1:
            weight.data = weight.data.bfloat16()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    state = optimizer.state[weight]
    full = _eager.full_weight(weight.detach(), state.get("master", state.get("low_bits")))
    assert (full - (1 - 20e-4)).abs().max() <= 1e-4


def test_flat_codes_of_version_0_2_load():
    """Values in memory order, which the parameter has too."""
    weight = torch.nn.Parameter(parameter().detach().to(memory_format=torch.channels_last))
    optimizer = made(weight, {"moments": "int8"})
    train(weight, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        codes = saved["state"][0][name]
        saved["state"][0][name] = codes.permute(0, 2, 3, 1).reshape(-1)
    other = made(weight, {"moments": "int8"})
    other.load_state_dict(saved)
    for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"):
        assert torch.equal(other.state[weight][name], optimizer.state[weight][name])
