"""The layers on the CPU: never worse than eager, gradients included, whatever the shape, layout and dtype."""

import pytest
import torch
from support.checks import FLOOR, assert_never_worse, run_at_level
from support.layer_cases import BF16, CASES, F32, compared, results
from support.paths import TESTS

from merit_fast.errors import BackendUnavailableError
from merit_fast.kernels import dispatch
from merit_fast.kernels.layers import _eager, add_rms_norm, geglu, rms_norm, rope, swiglu

pytestmark = pytest.mark.skipif(
    dispatch.native_module() is None, reason="the native kernels were not built"
)
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@DTYPES
@EVERY_CASE
def test_outputs_and_gradients_are_never_worse_than_eager(case, dtype):
    for ours, eager, truth in compared(case, dtype, "cpu", draws=6 if dtype == BF16 else 1):
        assert_never_worse(ours, eager, truth)


@pytest.mark.parametrize(
    "function", [swiglu, geglu, lambda *x, **o: geglu(*x, approximate="none", **o)]
)
def test_activations_are_right_over_all_floats(function):
    """Also where an exponential overflows or nothing is left of it."""
    ends = [value * sign for value in (1e-30, 15, 40, 88, 88.75, 95, 1e18) for sign in (1, -1)]
    gate = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor(ends)]).requires_grad_()
    ours = function(gate, torch.ones_like(gate), backend="cpu")
    truth = function(gate.double(), torch.ones_like(gate).double(), backend="eager")
    slopes = [torch.autograd.grad(y.sum(), gate, retain_graph=True)[0] for y in (ours, truth)]
    for value, exact in ((ours, truth), slopes):
        assert ((value - exact).abs() <= FLOOR[F32] * (1 + exact.abs())).all()


def test_a_norm_of_one_column():
    x, weight = torch.randn(50, 1, requires_grad=True), torch.randn(1)
    y = rms_norm(x, weight, 1e-6, backend="cpu")
    assert torch.allclose(y, x.sign() * weight, atol=1e-3)
    exact = rms_norm(x.double(), weight.double(), 1e-6, backend="eager")
    assert torch.allclose(y.double(), exact, rtol=1e-6)
    dx, exact = (torch.autograd.grad(result.sum(), x)[0] for result in (y, exact))
    scale = (weight / x).abs()
    assert ((dx - exact).abs() <= 1e-6 * scale).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize(
    "name", ["norm of 72", "add and norm of 72", "swiglu of 72", "geglu of 7", "rope"]
)
def test_what_is_not_finite_spreads_as_in_eager(name, value):
    inputs = [x.clone() for x in CASES[name].inputs(F32)]
    for x in inputs[: CASES[name].differentiated]:
        x[(*[0] * (x.dim() - 1), 3)] = value
    for ours, eager in zip(
        results(CASES[name], inputs, "cpu"), results(CASES[name], inputs, "eager"), strict=True
    ):
        assert torch.equal(ours.isfinite(), eager.isfinite())
        if (
            value != 3e38
        ):  # squares overflow, and what is then infinite and what NaN depends on the order of products
            assert torch.equal(ours.isnan(), eager.isnan())


def test_dtypes_may_differ_as_in_autocast():
    x, weight, residual = torch.randn(3, 72).to(BF16), torch.randn(72), torch.randn(3, 72)
    for casting in ("llama", "gemma"):
        ours, eager = (
            rms_norm(x, weight, 1e-6, casting=casting, backend=b) for b in ("cpu", "eager")
        )
        assert ours.dtype == eager.dtype and torch.allclose(ours, eager, rtol=1e-5, atol=1e-6)
        pairs = [
            add_rms_norm(x, residual, weight, 1e-6, casting=casting, backend=b)
            for b in ("cpu", "eager")
        ]
        for ours, eager in zip(*pairs, strict=True):
            assert ours.dtype == eager.dtype == F32 and torch.allclose(
                ours, eager, rtol=1e-5, atol=1e-6
            )
    narrow, wide = (
        rms_norm(residual, weight.to(BF16), 1e-6),
        rms_norm(residual, weight.to(BF16).float(), 1e-6),
    )
    assert torch.equal(narrow, wide)
    assert torch.equal(swiglu(x, residual), swiglu(x.float(), residual))


def test_gradients_have_the_dtypes_of_their_inputs():
    x, residual = (
        torch.randn(3, 72).to(BF16).requires_grad_(),
        torch.randn(3, 72, requires_grad=True),
    )
    weight = torch.randn(72, requires_grad=True)
    grads = []
    for backend in ("cpu", "eager"):
        out, total = add_rms_norm(x, residual, weight, 1e-6, backend=backend)
        grads.append(torch.autograd.grad((out.sin() + total.cos()).sum(), (x, residual, weight)))
    for ours, eager in zip(*grads, strict=True):
        assert ours.dtype == eager.dtype and torch.allclose(
            ours.float(), eager.float(), rtol=1e-2, atol=1e-4
        )
    q, angles = (
        torch.randn(1, 2, 5, 8).to(BF16).requires_grad_(),
        torch.rand(1, 5, 4).repeat(1, 1, 2),
    )
    pairs = [
        rope(q, q.detach(), angles.cos(), angles.sin(), backend=b)[0] for b in ("cpu", "eager")
    ]
    assert torch.equal(*pairs) and pairs[0].dtype == F32
    ours, eager = (torch.autograd.grad(y.square().sum(), q)[0] for y in pairs)
    assert ours.dtype == BF16
    assert_never_worse(ours, eager, 2 * q.detach().double())  # a rotation keeps the sum of squares


def views(x):
    """The same numbers [2, 6, 4, 8] in memory in other ways."""
    yield "transposed", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "part of a wider row", torch.cat([x, x], -1)[..., :8]
    yield "every other row", torch.stack([x, x], 3)[:, :, :, 0]
    yield "last dimension not dense", x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "packed heads", torch.cat([x, x], 2)[:, :, :4]


@DTYPES
def test_layouts_change_no_bit(dtype):
    x, weight, other = (
        torch.randn(2, 6, 4, 8).to(dtype),
        torch.randn(8).to(dtype),
        torch.randn(2, 6, 4, 8).to(dtype),
    )
    angles = torch.rand(1, 4, 8).to(dtype)
    calls = {
        "norm": lambda x: rms_norm(x, weight, 1e-6),
        "add x": lambda x: add_rms_norm(x, other, weight, 1e-6),
        "add residual": lambda x: add_rms_norm(other, x, weight, 1e-6),
        "gate": lambda x: swiglu(x, other),
        "up": lambda x: swiglu(other, x),
        "packed": swiglu,
        "rope": lambda x: rope(x, other[:, :2], angles.cos(), angles.sin()),
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
    "name", ["norm of 72", "add and norm of 72", "swiglu of 72", "packed swiglu of 72", "rope"]
)
def test_gradients_that_are_expanded_scalars(name):
    case, grads = CASES[name], []
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
    x, weight = torch.randn(5, 72, requires_grad=True), torch.randn(72)
    assert torch.allclose(rms_norm(x, None, 1e-6), _eager.rms_norm(x, None, 1e-6, 0.0, "llama"))
    y = rms_norm(x, weight, 1e-6)
    trained = rms_norm(x, weight.clone().requires_grad_(), 1e-6)
    assert torch.equal(
        *(torch.autograd.grad(result.square().sum(), x)[0] for result in (y, trained))
    )


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_may_be_used(used):
    inputs = [torch.randn(5, 72, requires_grad=True), torch.randn(5, 72, requires_grad=True)]
    weight, grads = torch.randn(72), []
    for backend in ("cpu", "eager"):
        y = add_rms_norm(*inputs, weight, 1e-6, backend=backend)[used]
        grads.append(torch.autograd.grad(y.square().sum(), inputs))
    for ours, eager in zip(*grads, strict=True):
        assert torch.allclose(ours, eager, rtol=1e-4, atol=1e-5)


def test_nothing_to_do_gives_empty_results_and_zero_gradients():
    for rows, columns in ((0, 8), (4, 0)):
        x, weight = (
            torch.zeros(rows, columns, requires_grad=True),
            torch.ones(columns, requires_grad=True),
        )
        out, total = add_rms_norm(x, x, weight, 1e-6)
        (rms_norm(x, weight, 1e-6).sum() + out.sum() + total.sum()).backward()
        assert x.grad.shape == (rows, columns) and weight.grad.eq(0).all()
        assert swiglu(x, x).shape == geglu(torch.zeros(rows, 2 * columns)).shape == (rows, columns)
    for tokens, width in ((0, 8), (3, 0)):
        positions = torch.zeros(1, tokens, width)
        assert rope(*(torch.zeros(2, 1, tokens, width),) * 2, positions, positions)[0].numel() == 0


SAME_BITS = """
import hashlib, torch
from support.layer_cases import CASES, BF16, F32, results
digest = hashlib.sha256()
for dtype in (F32, BF16):
    for case in CASES.values():
        torch.manual_seed(1)
        for value in results(case, case.inputs(dtype), "cpu"):
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_isa_levels_give_the_same_bits(native_levels, monkeypatch):
    import os

    monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{os.environ.get('PYTHONPATH', '')}")
    assert len({run_at_level(SAME_BITS, level) for level in native_levels}) == 1


@DTYPES
def test_the_number_of_threads_changes_no_bit(dtype):
    x, weight, wide = (
        torch.randn(300, 520).to(dtype),
        torch.randn(520).to(dtype),
        torch.randn(3, 41, 900).to(dtype),
    )
    heads, angles = torch.randn(2, 9, 70, 32).to(dtype), torch.rand(1, 70, 32).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, weight, wide, heads)]
            outputs = [
                rms_norm(*leaves[:2], 1e-6),
                swiglu(leaves[2]),
                *rope(leaves[3], leaves[3], angles, angles),
            ]
            outputs += add_rms_norm(leaves[0], leaves[0], leaves[1], 1e-6)
            gradients = [torch.full_like(y, 0.37) for y in outputs]
            found.append([*outputs, *torch.autograd.grad(outputs, leaves, gradients)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.inputs(F32)[0].numel() < 300])
def test_the_reference_has_the_gradients_of_its_formula(case):
    inputs = [x.double() for x in case.inputs(F32)]
    leaves = [x.requires_grad_(i < case.differentiated) for i, x in enumerate(inputs)]
    assert torch.autograd.gradcheck(lambda *x: case.run(*x, backend="eager"), leaves)


def test_wrong_arguments_are_named():
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    q, cos = torch.zeros(1, 2, 3, 8), torch.zeros(1, 3, 8)
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
    x, weight = torch.randn(2, 8).half(), torch.ones(8).half()
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6, backend="eager"))
    with pytest.raises(
        BackendUnavailableError,
        match="rms_norm: backend 'cpu' takes float32 and bfloat16, got torch.float16",
    ):
        rms_norm(x, weight, 1e-6, backend="cpu")
