"""The layers' Triton kernels in Triton's interpreter; ``test_interpreted.py`` runs these."""

import pytest
import torch
from support.checks import assert_never_worse
from support.kernels.layer_cases import BF16, CASES, F32, compared

from merit_fast.kernels.layers import _triton, add_rms_norm, rms_norm, rope, swiglu

DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


@DTYPES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients_are_never_worse_than_eager(case, dtype):
    for ours, eager, truth in compared(case, dtype, "triton", draws=3 if dtype == BF16 else 1):
        assert_never_worse(ours, eager, truth)


@pytest.mark.parametrize("name,programs", [("norm of 40 rows", 3), ("norm of 9000", 1)])
def test_programs_of_several_steps_sum_all_rows(name, programs, monkeypatch):
    monkeypatch.setattr(_triton, "PROGRAMS", programs)
    monkeypatch.setattr(_triton, "TILE", 64)
    for ours, eager, truth in compared(CASES[name], F32, "triton"):
        assert_never_worse(ours, eager, truth)


def test_dtypes_may_differ_as_in_autocast():
    x = torch.randn(3, 72).to(BF16)
    weight = torch.randn(72)
    assert rms_norm(x, weight, 1e-6, backend="triton").dtype == F32
    out, total = add_rms_norm(x, torch.randn(3, 72), weight, 1e-6, backend="triton")
    assert out.dtype == total.dtype == F32
    q = torch.randn(1, 2, 5, 8).to(BF16).requires_grad_()
    angles = torch.rand(1, 5, 8)
    turned, _ = rope(q, q.detach(), angles.cos(), angles.sin(), backend="triton")
    expected, _ = rope(q, q.detach(), angles.cos(), angles.sin(), backend="eager")
    assert turned.dtype == F32 and torch.allclose(turned, expected)
    assert torch.autograd.grad(turned.sum(), q)[0].dtype == BF16


def test_nothing_to_do_gives_empty_results_and_zero_gradients():
    x = torch.zeros(0, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    rms_norm(x, weight, 1e-6, backend="triton").sum().backward()
    assert x.grad.shape == (0, 8) and weight.grad.eq(0).all()
    assert swiglu(torch.zeros(0, 8), torch.zeros(0, 8), backend="triton").shape == (0, 8)
    assert (
        rope(*(torch.zeros(2, 1, 0, 8),) * 2, *(torch.zeros(1, 0, 8),) * 2, backend="triton")[
            0
        ].numel()
        == 0
    )
