"""The layers in torch's machinery: ops, compiler, checkpointing, torch.func, dispatch modes."""

import pytest
import torch
from support.kernels.layer_cases import BF16, CASES, F32
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from merit_fast.kernels import dispatch
from merit_fast.kernels.layers import add_rms_norm, geglu, rms_norm, rope, swiglu

pytestmark = pytest.mark.skipif(
    dispatch.native_module() is None, reason="the native kernels were not built"
)
OPS = torch.ops.merit_fast


def block(x, weight, q, k, cos, sin):
    """Every layer once; the ropes' heads in both layouts."""
    normed, total = add_rms_norm(x, 0.5 * x, weight, 1e-6)
    other = rms_norm(total, weight, 1e-6, casting="gemma", offset=1.0)
    gated = (
        swiglu(normed, other)
        + geglu(normed, other, approximate="none")
        + geglu(torch.cat([normed, other], -1))
    )
    turned = rope(*rope(q.transpose(1, 2), k, cos, sin), cos, sin, interleaved=True)
    return gated.sum() + sum((y * y.detach().cos()).sum() for y in turned)


def arguments(dtype=F32):
    torch.manual_seed(3)
    shapes = ((2, 5, 72), (72,), (2, 5, 4, 16), (2, 2, 5, 16))
    angles = torch.rand(1, 5, 16).to(dtype)
    return [
        *(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes),
        angles.cos(),
        angles.sin(),
    ]


def gradients(function, inputs):
    return torch.autograd.grad(function(*inputs), inputs[:4])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_compiled_block_is_one_graph_with_the_same_bits(dtype):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for ours, direct in zip(
        gradients(compiled, arguments(dtype)), gradients(block, arguments(dtype)), strict=True
    ):
        assert torch.equal(ours, direct)


def test_inductor_compiles_a_block_of_any_length():
    compiled = torch.compile(
        lambda x, weight: swiglu(rms_norm(x, weight, 1e-6)), fullgraph=True, dynamic=True
    )
    for tokens in (3, 8):
        x = torch.randn(2, tokens, 72, requires_grad=True)
        weight = torch.randn(72, requires_grad=True)
        y = compiled(x, weight)
        assert torch.equal(y, swiglu(rms_norm(x, weight, 1e-6)))
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_ops_keep_the_contracts_of_custom_ops():
    x, weight, q, k, cos, sin = arguments()
    y = torch.randn(2, 5, 72, requires_grad=True)
    calls = {
        OPS.rms_norm: [
            (x, weight, 1e-6, 0.0, "llama", "cpu"),
            (q.transpose(1, 2), None, 1e-6, 0.0, "gemma", "cpu"),
        ],
        OPS.add_rms_norm: [(x, y, weight, 1e-6, 1.0, "gemma", "cpu")],
        OPS.gated: [(x, y, kind, "cpu") for kind in ("silu", "gelu", "gelu_tanh")],
        OPS.gated_packed: [(x, "silu", "cpu")],
        OPS.rope: [(q.transpose(1, 2), k, cos, sin, turns, "cpu") for turns in (False, True)],
    }
    detached = [t.detach() for t in (x, y, weight, q, k)]
    x, y, weight, q, k = detached
    calls |= {
        OPS.rms_norm_backward: [
            (y, y.clone(), x, weight, 1e-6, 0.0, True, "cpu"),
            (y, None, x, None, 1e-6, 0.0, False, "cpu"),
        ],
        OPS.gated_backward: [(y, x, y.clone(), "silu", "cpu")],
        OPS.gated_packed_backward: [(y[..., :36], x, "gelu", "cpu")],
        OPS.rope_backward: [(q.transpose(1, 2), k, cos, sin, True, F32, True, False, "cpu")],
    }
    for op, argument_lists in calls.items():
        for each in argument_lists:
            torch.library.opcheck(op.default, each)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(reentrant):
    inputs = arguments()
    checkpoint(block, *inputs, use_reentrant=reentrant).backward()
    for ours, direct in zip(inputs[:4], gradients(block, arguments()), strict=True):
        assert torch.equal(ours.grad, direct)


def test_a_gradient_of_a_gradient_raises_except_in_eager():
    x = torch.randn(3, 8, requires_grad=True)
    for call in (
        lambda: swiglu(x),
        lambda: OPS.gated_packed(x, "silu", "cpu"),
        lambda: rms_norm(x, None, 1e-6),
    ):
        (first,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice|no autograd formula"):
            first.sum().backward()
    (first,) = torch.autograd.grad(swiglu(x, backend="eager").square().sum(), x, create_graph=True)
    assert torch.autograd.grad(first.sum(), x)[0].isfinite().all()


def test_function_transforms_take_the_gradient():
    x = torch.randn(3, 8)
    weight = torch.randn(8)
    loss = lambda x: swiglu(rms_norm(x, weight, 1e-6)).square().sum()  # noqa: E731
    leaf = x.clone().requires_grad_()
    assert torch.equal(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])


def test_function_transforms_map_over_examples():
    """vmap, gradients of every example, and the gradient of a mapped function are eager's."""
    torch.manual_seed(0)
    heads = (torch.randn(3, 1, 2, 4, 6), torch.randn(3, 1, 1, 4, 6))
    angles = torch.rand(1, 4, 6)
    mapped = (None, 0, 0, 0)

    def loss_of(backend):
        def loss(weight, x, q, k):
            normed, total = add_rms_norm(x, 0.5 * x, weight, 1e-6, backend=backend)
            other = rms_norm(normed, weight, 1e-6, backend=backend)
            y = swiglu(other, total)
            turned = rope(q, k, angles.cos(), angles.sin(), backend=backend)
            sums = [(t * t.detach().cos()).sum() for t in turned]
            return y.square().sum() + geglu(y, backend=backend).sum() + sum(sums)

        return loss

    inputs = (torch.randn(8), torch.randn(3, 5, 8), *heads)
    results = []
    for backend in ("cpu", "eager"):
        loss = loss_of(backend)
        each = torch.vmap(loss, mapped)
        gradients = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)), mapped)(*inputs)
        of_sum = torch.func.grad(lambda *x, each=each: each(*x).sum())(*inputs)
        results.append([each(*inputs), *gradients, of_sum])
    for ours, eager in zip(*results, strict=True):
        assert torch.allclose(ours, eager, rtol=1e-4, atol=1e-4)


def test_a_map_over_no_example_is_refused():
    x = torch.zeros(0, 3, 8)
    with pytest.raises(ValueError, match="torch.vmap: a batch must have an entry, got"):
        torch.vmap(swiglu)(x)


def test_functional_calls_reach_the_layers():
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, x):
            return rms_norm(x, self.weight, 1e-6, backend="cpu")

    x = torch.randn(3, 8)
    weight = torch.randn(8)

    def call(weight):
        return torch.func.functional_call(Norm(), {"weight": weight}, x).square().sum()

    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(rms_norm(x, leaf, 1e-6).square().sum(), leaf)
    assert torch.equal(torch.func.grad(call)(weight), expected)


def test_ops_may_be_captured_in_cuda_graphs():
    """A compiler keeps traced strides, and no op is excluded from captured graphs."""
    names = ("rms_norm", "add_rms_norm", "gated", "gated_packed", "rope")
    backwards = ("rms_norm", "gated", "gated_packed", "rope")
    for name in (*names, *(f"{name}_backward" for name in backwards)):
        tags = getattr(OPS, name).default.tags
        assert torch.Tag.needs_exact_strides in tags and torch.Tag.cudagraph_unsafe not in tags


def test_dispatch_modes_see_the_ops():
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Seen.names += (function.name(),)
            return function(*args, **(kwargs or {}))

    x = torch.randn(3, 8, requires_grad=True)
    with Seen():
        swiglu(x).sum().backward()
    assert {"merit_fast::gated_packed", "merit_fast::gated_packed_backward"} <= set(Seen.names)
    with FlopCounterMode(display=False):
        rms_norm(x, torch.ones(8), 1e-6)


def test_the_meta_device_gives_shapes():
    x = torch.empty(2, 5, 8, device="meta")
    weight = torch.empty(8, device="meta")
    assert rms_norm(x, weight, 1e-6).shape == x.shape and swiglu(x).shape == (2, 5, 4)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(2, 5, 8))
        assert swiglu(fake).shape == (2, 5, 4)


@pytest.mark.parametrize("name", ["norm of 72", "swiglu of 72", "rope"])
def test_inputs_changed_before_backward_are_noticed(name):
    case = CASES[name]
    inputs = [
        x.clone().requires_grad_(i < case.differentiated) for i, x in enumerate(case.inputs(F32))
    ]
    changed = [x * 1 for x in inputs]
    outputs = case.run(
        *changed[: case.differentiated],
        *(x.detach() for x in changed[case.differentiated :]),
        backend="cpu",
    )
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    with torch.no_grad():
        for x in changed:
            x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()
