"""AdamW's Triton kernel in Triton's interpreter; ``test_interpreted.py`` runs these."""

import pytest
import torch
from support.kernels.optimizer_runs import assert_same_run, train

from merit_fast.kernels.optimizer import _ops, _triton

OPTIONS = [
    ("fp32", {}),
    ("fp32", {"average_decay": 0.9, "zero_grad": True, "max_norm": 1.0}),
    ("fp32", {"moments": "int8"}),
    ("fp32", {"moments": "bf16", "rounding": "nearest", "betas": (0.3, 0.9)}),
    ("bf16", {"average_decay": "mean"}),
    ("bf16", {"moments": "bf16", "zero_grad": True}),
    ("bf16", {"moments": "int8", "rounding": "nearest"}),
    ("bf16", {"master": "fp32", "moments": "int8"}),
    ("bf16", {"master": "split", "average_decay": 0.5, "max_norm": 0.1}),
    ("bf16", {"master": "split8", "moments": "int8", "average_decay": 0.5}),
    ("bf16", {"master": "split8", "rounding": "nearest"}),
]


@pytest.mark.parametrize("dtype,options", OPTIONS, ids=str)
def test_the_kernel_gives_the_bits_of_eager(dtype, options):
    """A clip may differ in its last bit, since the norm's sums have another order."""
    exact = "max_norm" not in options
    assert_same_run(
        train(dtype, backend="triton", **options),
        train(dtype, backend="eager", **options),
        exact=exact,
    )


def test_nan_and_infinity_stay_where_they_are():
    gradients = torch.randn(1500)
    gradients[700] = float("nan")
    gradients[900] = float("inf")
    for options in (
        {},
        {"moments": "bf16"},
        {"moments": "int8"},
        {"master": "split"},
        {"master": "split8"},
        {"master": "fp32"},
    ):
        runs = [
            train("bf16", backend=b, steps=2, gradients=[gradients], **options)
            for b in ("triton", "eager")
        ]
        assert_same_run(*runs)
        assert bool(runs[0][0][0][700].isnan()) and bool(runs[0][0][0][2].isfinite())


def test_many_tensors_are_one_launch(monkeypatch):
    launches = []
    kernel = _triton.adamw_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(_triton, "adamw_kernel", Counted())
    parameters, _ = train("fp32", backend="triton", steps=1)
    assert launches == [(sum(-(-p.numel() // _triton.BLOCK) for p in parameters),)]


def test_a_weight_written_by_someone_else_wins_over_its_master():
    runs = []
    for backend in ("triton", "eager"):
        parameters, optimizer = train("bf16", 1, master="fp32", backend=backend)
        with torch.no_grad():
            parameters[3][-1] = 5.0
        won = []
        original = _ops.adamw

        def keeping(*given, original=original, won=won):
            won.append(original(*given))
            return won[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_ops, "adamw", keeping)
            train("bf16", 1, 1, parameters, optimizer)
        assert [flags.tolist() for flags in won] == [[False, False, False, True, False, False]]
        runs.append((parameters, optimizer))
    assert_same_run(*runs)
