"""The loss's kernels in Triton's interpreter; ``test_interpreted.py`` runs these."""

import pytest
import torch
from support.kernels.loss_cases import assert_never_worse, batch, everything, packed

from merit_fast.kernels.cross_entropy import _tiled, _triton, linear_token_statistics
from merit_fast.kernels.labels import IGNORED_LABEL
from merit_fast.kernels.sketch import CountSketch

ALL = dict(bias=True, softcap=3.0, label_smoothing=0.1, z_loss=1e-2)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"softcap": 3.0}, ALL], ids=["plain", "bias", "cap", "all"]
)
def test_never_worse_than_eager(dtype, options):
    assert_never_worse(packed, "triton", dtype, **options)


@DTYPES
def test_rows_of_several_blocks_and_tiles(dtype, monkeypatch):
    monkeypatch.setattr(
        _tiled, "work_dtype", lambda weight: weight.dtype
    )  # bf16 logits, as on a GPU
    monkeypatch.setattr(_tiled, "FEWEST_COLUMNS", 640)
    monkeypatch.setitem(_tiled.TILE_BYTES, "cpu", 4 * 3 * 640)
    monkeypatch.setattr(_triton, "UPDATE_BLOCK", 256)
    monkeypatch.setattr(_triton, "GRADIENT_BLOCK", 128)
    assert_never_worse(packed, "triton", dtype, **ALL)


def test_words_that_a_bias_of_minus_infinity_forbids():
    of = batch(bias=True, vocabulary=1500)
    of.bias[:1100] = -torch.inf
    of.labels[of.labels >= 0] = 1200
    ours = everything(of, "triton")
    eager = everything(of, "eager")
    for name in ("loss", "hidden", "weight"):
        torch.testing.assert_close(ours[name], eager[name])


def test_without_a_target_token_nothing_is_launched():
    of = batch(tokens=3)
    of.labels[:] = IGNORED_LABEL
    assert not any(value.any() for value in everything(of, "triton").values())


def test_the_sketch_of_the_head():
    sketches = []
    for backend in ("triton", "eager"):
        out = torch.zeros(4, 4096)
        torch.manual_seed(1)
        of = packed(sketch=CountSketch(4096), sketch_name="head", sketch_out=out, vocabulary=130)
        everything(of, backend, frozen=("weight",))
        sketches.append(out)
    torch.testing.assert_close(*sketches)


@DTYPES
@pytest.mark.parametrize("form", [{}, dict(softcap=3.0, scale=0.7, temperature=1.3)])
def test_the_statistics_of_tokens(dtype, form, monkeypatch):
    monkeypatch.setattr(_tiled, "FEWEST_COLUMNS", 64)
    monkeypatch.setitem(_tiled.TILE_BYTES, "cpu", 16 * 64)
    monkeypatch.setattr(_triton, "UPDATE_BLOCK", 32)
    of = batch(tokens=11, width=9, vocabulary=150, dtype=dtype, bias=True)
    of.labels[3] = int((of.hidden[3].float() @ of.weight.float().T + of.bias.float()).argmax())
    results = {}
    for backend in ("triton", "cpu"):
        leaves = [tensor.clone().requires_grad_() for tensor in (of.hidden, of.weight, of.bias)]
        statistics = linear_token_statistics(
            leaves[0], leaves[1], of.labels, bias=leaves[2],
            entropy=True, top1=True, backend=backend, **form,
        )  # fmt: skip
        (statistics.log_probs * 0.3 + statistics.entropy).sum().backward()
        results[backend] = (*statistics, *(leaf.grad for leaf in leaves))
    assert results["triton"][2].any()
    for ours, native in zip(results["triton"], results["cpu"], strict=True):
        torch.testing.assert_close(ours, native)
