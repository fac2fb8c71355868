"""The layers on the CPU: never worse than eager, gradients included, for every shape and dtype."""

import pytest
import torch
from support.checks import FLOOR, assert_never_worse, run_at_level
from support.kernels.layer_cases import BF16, CASES, F32, compared, results
from support.paths import TESTS

from merit_fast.kernels import dispatch
from merit_fast.kernels.layers import add_rms_norm, geglu, rms_norm, rope, swiglu

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
    """Values are finite also where an exponential overflows or nothing is left of it."""
    ends = [value * sign for value in (1e-30, 15, 40, 88, 88.75, 95, 1e18) for sign in (1, -1)]
    gate = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor(ends)]).requires_grad_()
    ours = function(gate, torch.ones_like(gate), backend="cpu")
    truth = function(gate.double(), torch.ones_like(gate).double(), backend="eager")
    slopes = [torch.autograd.grad(y.sum(), gate, retain_graph=True)[0] for y in (ours, truth)]
    for value, exact in ((ours, truth), slopes):
        assert ((value - exact).abs() <= FLOOR[F32] * (1 + exact.abs())).all()


def test_a_norm_of_one_column():
    x = torch.randn(50, 1, requires_grad=True)
    weight = torch.randn(1)
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
        # Squares of 3e38 overflow: the order of products decides between infinity and NaN.
        if value != 3e38:
            assert torch.equal(ours.isnan(), eager.isnan())


@pytest.mark.parametrize("columns", [31, 64, 700])
def test_subnormal_and_undefined_results_round_as_all_others(columns):
    """The processor's own conversion to bf16 would flush the former and change the latter."""
    gate = torch.full((3, columns), 90.0)  # its SiLU is 90
    up = torch.randn(3, columns) * torch.tensor([[1e-40], [1e-38], [1.0]])
    up[2, 7] = float("nan")
    up[2, 9] = -float("inf")
    up = up.to(BF16)
    ours = swiglu(gate.to(BF16), up, backend="cpu")
    exact = (90.0 * up.float()).to(BF16)
    assert torch.equal(ours.isnan(), exact.isnan())
    assert torch.equal(ours.nan_to_num(), exact.nan_to_num())
    assert ours[0].count_nonzero() > columns // 2


def test_positions_in_sections_are_rope_of_combined_angles():
    """M-RoPE (Qwen2-VL): pairs of a head turn by the position id of their section."""
    q = torch.randn(2, 4, 5, 16)
    k = torch.randn(2, 2, 5, 16)
    ids = torch.randint(0, 50, (3, 2, 5))  # time, height, width
    section_of = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    frequencies = 100.0 ** (-torch.arange(8) / 8)
    angles = ids[section_of].permute(1, 2, 0) * frequencies  # [B, T, R / 2]
    both = angles.repeat(1, 1, 2)
    turns = torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double()).unsqueeze(1)
    for ours, x in zip(rope(q, k, both.cos(), both.sin(), backend="cpu"), (q, k), strict=True):
        low, high = x.double().chunk(2, -1)
        exact = torch.complex(low, high) * turns
        assert torch.allclose(ours.double(), torch.cat([exact.real, exact.imag], -1), atol=1e-5)


@DTYPES
def test_interleaved_rope_is_that_of_cohere(dtype):
    modeling = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    q = torch.randn(2, 4, 5, 16).to(dtype)
    k = torch.randn(2, 2, 5, 16).to(dtype)
    angles = (torch.rand(1, 5, 8) * 6).repeat_interleave(2, -1).to(dtype)
    theirs = modeling.apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    ours = rope(q, k, angles.cos(), angles.sin(), interleaved=True, backend="cpu")
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and torch.allclose(mine, other, rtol=2**-8, atol=1e-6)


def test_dtypes_may_differ_as_in_autocast():
    x = torch.randn(3, 72).to(BF16)
    weight = torch.randn(72)
    residual = torch.randn(3, 72)
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
    narrow = rms_norm(residual, weight.to(BF16), 1e-6)
    wide = rms_norm(residual, weight.to(BF16).float(), 1e-6)
    assert torch.equal(narrow, wide)
    assert torch.equal(swiglu(x, residual), swiglu(x.float(), residual))


def test_gradients_have_the_dtypes_of_their_inputs():
    x = torch.randn(3, 72).to(BF16).requires_grad_()
    residual = torch.randn(3, 72, requires_grad=True)
    weight = torch.randn(72, requires_grad=True)
    grads = []
    for backend in ("cpu", "eager"):
        out, total = add_rms_norm(x, residual, weight, 1e-6, backend=backend)
        grads.append(torch.autograd.grad((out.sin() + total.cos()).sum(), (x, residual, weight)))
    for ours, eager in zip(*grads, strict=True):
        assert ours.dtype == eager.dtype and torch.allclose(
            ours.float(), eager.float(), rtol=1e-2, atol=1e-4
        )
    q = torch.randn(1, 2, 5, 8).to(BF16).requires_grad_()
    angles = torch.rand(1, 5, 4).repeat(1, 1, 2)
    pairs = [
        rope(q, q.detach(), angles.cos(), angles.sin(), backend=b)[0] for b in ("cpu", "eager")
    ]
    assert torch.equal(*pairs) and pairs[0].dtype == F32
    ours, eager = (torch.autograd.grad(y.square().sum(), q)[0] for y in pairs)
    assert ours.dtype == BF16
    assert_never_worse(ours, eager, 2 * q.detach().double())  # a rotation keeps the sum of squares


SAME_BITS = """
import hashlib, torch
from support.kernels.layer_cases import CASES, BF16, F32, results
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
    x = torch.randn(300, 520).to(dtype)
    weight = torch.randn(520).to(dtype)
    wide = torch.randn(3, 41, 900).to(dtype)
    heads = torch.randn(2, 9, 70, 32).to(dtype)
    angles = torch.rand(1, 70, 32).to(dtype)
    before = torch.get_num_threads()
    runs = []
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
            runs.append([*outputs, *torch.autograd.grad(outputs, leaves, gradients)])
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.inputs(F32)[0].numel() < 300])
def test_the_reference_has_the_gradients_of_its_formula(case):
    inputs = [x.double() for x in case.inputs(F32)]
    leaves = [x.requires_grad_(i < case.differentiated) for i, x in enumerate(inputs)]
    assert torch.autograd.gradcheck(lambda *x: case.run(*x, backend="eager"), leaves)
