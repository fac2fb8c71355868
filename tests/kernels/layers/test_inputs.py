"""The layers' inputs: layouts in memory, frozen weights, empty tensors, wrong arguments."""

import pytest
import torch
from support.kernels.layer_cases import BF16, CASES, F32

from merit_fast.errors import BackendUnavailableError
from merit_fast.kernels import dispatch
from merit_fast.kernels.layers import (
    _eager,
    add_rms_norm,
    geglu,
    rms_norm,
    rope,
    swiglu,
)

pytestmark = pytest.mark.skipif(
    dispatch.native_module() is None, reason="the native kernels were not built"
)
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def views(x):
    """Views with the numbers of x [2, 6, 4, 8] in other places of memory."""
    yield "transposed", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "slice of a wider row", torch.cat([x, x], -1)[..., :8]
    yield "every other row", torch.stack([x, x], 3)[:, :, :, 0]
    yield "last dimension not dense", x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "packed heads", torch.cat([x, x], 2)[:, :, :4]


@DTYPES
def test_layouts_change_no_bit(dtype):
    x = torch.randn(2, 6, 4, 8).to(dtype)
    weight = torch.randn(8).to(dtype)
    other = torch.randn(2, 6, 4, 8).to(dtype)
    angles = torch.rand(1, 4, 8).to(dtype)
    calls = {
        "norm": lambda x: rms_norm(x, weight, 1e-6),
        "add x": lambda x: add_rms_norm(x, other, weight, 1e-6),
        "add residual": lambda x: add_rms_norm(other, x, weight, 1e-6),
        "gate": lambda x: swiglu(x, other),
        "up": lambda x: swiglu(other, x),
        "packed": swiglu,
        "rope": lambda x: rope(x, other[:, :2], angles.cos(), angles.sin()),
        "interleaved rope": lambda x: rope(x, x, angles.cos(), angles.sin(), interleaved=True),
    }
    for call in calls.values():
        expected = with_gradient(call, x)
        for name, view in views(x):
            assert torch.equal(view, x)
            for ours, right in zip(with_gradient(call, view), expected, strict=True):
                assert torch.equal(ours, right), name


def with_gradient(call, x):
    x = x.detach().requires_grad_()
    outputs = call(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(sum((y.float() ** 2).sum() for y in outputs), x)]


def test_results_lie_in_memory_as_the_inputs_do():
    heads = torch.randn(2, 7, 4, 8).transpose(1, 2)
    assert rms_norm(heads, torch.ones(8), 1e-6).stride() == heads.stride()
    leaf = torch.randn(2, 7, 32, requires_grad=True)
    q = leaf.view(2, 7, 4, 8).transpose(1, 2)
    q_out, k_out = rope(q, q[:, :2].contiguous(), torch.rand(1, 7, 8), torch.rand(1, 7, 8))
    assert q_out.stride() == q.stride() and k_out.is_contiguous()
    assert torch.autograd.grad(q_out.square().sum(), leaf)[0].is_contiguous()


@pytest.mark.parametrize(
    "name",
    [
        "norm of 72",
        "add and norm of 72",
        "swiglu of 72",
        "packed swiglu of 72",
        "rope",
    ],
)
def test_gradients_that_are_expanded_scalars(name):
    case = CASES[name]
    grads = []
    inputs = [x.requires_grad_(i < case.differentiated) for i, x in enumerate(case.inputs(F32))]
    for backend in ("cpu", "eager"):
        outputs = case.run(*inputs, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads.append(
            torch.autograd.grad(sum(y.sum() for y in outputs), inputs[: case.differentiated])
        )
    for ours, eager in zip(*grads, strict=True):
        assert torch.allclose(ours, eager, rtol=1e-4, atol=1e-5)


def test_without_weight_and_with_a_frozen_one():
    x = torch.randn(5, 72, requires_grad=True)
    weight = torch.randn(72)
    assert torch.allclose(rms_norm(x, None, 1e-6), _eager.rms_norm(x, None, 1e-6, 0.0, "llama"))
    y = rms_norm(x, weight, 1e-6)
    trained = rms_norm(x, weight.clone().requires_grad_(), 1e-6)
    assert torch.equal(
        *(torch.autograd.grad(result.square().sum(), x)[0] for result in (y, trained))
    )


@pytest.mark.parametrize("used", [0, 1])
def test_a_single_output_may_be_used(used):
    inputs = [torch.randn(5, 72, requires_grad=True), torch.randn(5, 72, requires_grad=True)]
    weight = torch.randn(72)
    grads = []
    for backend in ("cpu", "eager"):
        y = add_rms_norm(*inputs, weight, 1e-6, backend=backend)[used]
        grads.append(torch.autograd.grad(y.square().sum(), inputs))
    for ours, eager in zip(*grads, strict=True):
        assert torch.allclose(ours, eager, rtol=1e-4, atol=1e-5)


def test_nothing_to_do_gives_empty_results_and_zero_gradients():
    for rows, columns in ((0, 8), (4, 0)):
        x = torch.zeros(rows, columns, requires_grad=True)
        weight = torch.ones(columns, requires_grad=True)
        out, total = add_rms_norm(x, x, weight, 1e-6)
        (rms_norm(x, weight, 1e-6).sum() + out.sum() + total.sum()).backward()
        assert x.grad.shape == (rows, columns) and weight.grad.eq(0).all()
        assert swiglu(x, x).shape == geglu(torch.zeros(rows, 2 * columns)).shape == (rows, columns)
    for tokens, width in ((0, 8), (3, 0)):
        positions = torch.zeros(1, tokens, width)
        assert rope(*(torch.zeros(2, 1, tokens, width),) * 2, positions, positions)[0].numel() == 0


def test_wrong_arguments_are_named():
    x = torch.zeros(2, 8)
    weight = torch.zeros(8)
    q = torch.zeros(1, 2, 3, 8)
    cos = torch.zeros(1, 3, 8)
    for call, words in (
        (
            lambda: rms_norm(x, torch.zeros(7), 1e-6),
            r"rms_norm: x must be \[..., H\] and weight \[H\], got \[2, 8\], \[7\]",
        ),
        (
            lambda: rms_norm(x, weight, 1e-6, casting="t5"),
            "rms_norm: casting must be one of llama, gemma, got 't5'",
        ),
        (
            lambda: add_rms_norm(x, x[:1], weight, 1e-6),
            r"add_rms_norm: residual must be as x, \[2, 8\], got \[1, 8\]",
        ),
        (
            lambda: swiglu(x, x[:1]),
            r"swiglu: gate and up must be \[..., I\] of one shape, got \[2, 8\], \[1, 8\]",
        ),
        (lambda: swiglu(x[:, :7]), r"swiglu: gate without up must be \[..., 2 I\], got \[2, 7\]"),
        (
            lambda: geglu(x, x, approximate="erf"),
            "geglu: approximate must be 'tanh' or 'none', got 'erf'",
        ),
        (lambda: rope(q, q[0], cos, cos), r"rope: q and k must be \[B, heads, T, D\], got"),
        (
            lambda: rope(q, q, cos[:, :2], cos[:, :2]),
            r"rope: cos and sin must be \[1 or 1, 3, R\] with an even R <= 8",
        ),
        (
            lambda: rope(q, q.to(BF16), cos, cos),
            "rope: q and k, cos and sin must have one dtype each",
        ),
        (
            lambda: rope(q, q, cos.requires_grad_(), cos),
            "rope: cos and sin must not require gradients",
        ),
        (
            lambda: rms_norm(x, weight.to("meta"), 1e-6),
            "rms_norm: tensors must be on one device, got cpu, meta",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_other_dtypes_run_in_eager_unless_a_kernel_was_asked_for():
    x = torch.randn(2, 8).half()
    weight = torch.ones(8).half()
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6, backend="eager"))
    with pytest.raises(
        BackendUnavailableError,
        match="rms_norm: backend 'cpu' takes float32 and bfloat16, got torch.float16",
    ):
        rms_norm(x, weight, 1e-6, backend="cpu")
