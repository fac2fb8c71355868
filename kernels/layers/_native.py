"""The native kernels' callers: where tensors lie becomes addresses and strides."""

from types import ModuleType

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels.layers._layout import as_rows, dense_rows

ABSENT = (0, False, 0)
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


def norm(
    x: Tensor,
    residual: Tensor | None,
    total: Tensor | None,
    out: Tensor,
    scale: Tensor,
    epsilon: float,
    rounds: bool,
) -> None:
    """out = RMSNorm(x) * scale, or of x + residual, which goes to ``total``."""
    kept, given = _given(out, x, residual, total)
    x_rows, residual_rows, total_rows = given
    native().norm(
        *_sizes(out), x_rows, residual_rows, total_rows, _rows(out, out.shape[-1]), scale.data_ptr(), epsilon, rounds,
        torch.get_num_threads(),
    )  # fmt: skip
    del kept


def norm_backward(
    dout: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    dx: Tensor,
    scale: Tensor,
    epsilon: float,
    dscale: Tensor | None,
) -> None:
    kept, (dout_rows, x_rows, dtotal_rows) = _given(dx, dout, x, dtotal)
    native().norm_backward(
        *_sizes(dx), dout_rows, x_rows, dtotal_rows, _rows(dx, dx.shape[-1]), scale.data_ptr(), epsilon,
        0 if dscale is None else dscale.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    del kept


def gated(gate: Tensor, up: Tensor, out: Tensor, activation: str) -> None:
    kept, (gate_rows, up_rows) = _given(out, gate, up)
    flat = _as_one_row(_sizes(out), gate_rows, up_rows)
    native().gated(
        *flat,
        gate_rows,
        up_rows,
        _rows(out, out.shape[-1]),
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    del kept


def gated_backward(
    dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, activation: str
) -> None:
    """dgate and dup lie alike: dense, or the halves of a dense tensor."""
    kept, (dout_rows, gate_rows, up_rows, dgate_rows, dup_rows) = _given(
        dgate, dout, gate, up, dgate, dup
    )
    flat = _as_one_row(_sizes(dgate), dout_rows, gate_rows, up_rows, dgate_rows, dup_rows)
    native().gated_backward(
        *flat,
        dout_rows,
        gate_rows,
        up_rows,
        dgate_rows,
        dup_rows,
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    del kept


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor, backward: bool
) -> None:
    q, k, cos, sin = (dense_rows(x) for x in (q, k, cos, sin))
    batch, _, tokens, width = q.shape
    native().rope(
        (batch, tokens, width, cos.shape[-1]), _heads(q), _heads(k), _heads(q_out), _heads(k_out),
        _positions(cos), _positions(sin), backward, torch.get_num_threads(),
    )  # fmt: skip


def native() -> ModuleType:
    module = dispatch.native_module()
    assert module is not None
    return module


Rows = tuple[int, bool, int]


def _rows(x: Tensor, stride: int) -> Rows:
    return x.data_ptr(), x.dtype == torch.bfloat16, stride


def _given(out: Tensor, *tensors: Tensor | None) -> tuple[list[Tensor], list[Rows]]:
    """The tensors as rows in the order of ``out``'s, beside the copies that must outlive the call."""
    kept, rows = [], []
    for x in tensors:
        if x is None:
            rows.append(ABSENT)
        else:
            x, stride = as_rows(x, out)
            kept.append(x)
            rows.append(_rows(x, stride))
    return kept, rows


def _sizes(x: Tensor) -> tuple[int, int]:
    cols = x.shape[-1]
    return (x.numel() // cols if cols else 0), cols


def _as_one_row(sizes: tuple[int, int], *tensors: Rows) -> tuple[int, int]:
    """One long row where all are dense: threads then share it evenly, however narrow its rows are."""
    rows, cols = sizes
    return (1, rows * cols) if all(stride == cols for *_, stride in tensors) else sizes


def _heads(x: Tensor) -> tuple[int, bool, int, int, int, int]:
    return (
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        x.shape[1],
        x.stride(0),
        x.stride(1),
        x.stride(2),
    )


def _positions(x: Tensor) -> tuple[int, bool, int, int, int, int]:
    """cos or sin [B or 1, T, R], as if with one head."""
    return (
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        1,
        x.stride(0) if len(x) > 1 else 0,
        0,
        x.stride(1),
    )
