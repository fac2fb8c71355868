"""The layers' calls of merit_fast._C: where tensors lie becomes addresses and strides."""

from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels._devices import address
from merit_fast.kernels.layers._layout import as_rows, dense_rows

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
    rows = _Rows(out)
    rows.native.norm(
        **rows.sizes(),
        x=rows.matrix(x),
        residual=rows.optional(residual),
        total=rows.optional(total),
        out=rows.dense(out),
        scale=scale.data_ptr(),
        epsilon=epsilon,
        round_first=rounds,
    )


def norm_backward(
    dout: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    dx: Tensor,
    scale: Tensor,
    epsilon: float,
    dscale: Tensor | None,
) -> None:
    """Write the gradients of ``norm``; ``dtotal`` is added to that of x."""
    rows = _Rows(dx)
    rows.native.norm_backward(
        **rows.sizes(),
        dout=rows.matrix(dout),
        x=rows.matrix(x),
        dtotal=rows.optional(dtotal),
        dx=rows.dense(dx),
        scale=scale.data_ptr(),
        epsilon=epsilon,
        dscale=address(dscale),
    )


def gated(gate: Tensor, up: Tensor, out: Tensor, activation: str) -> None:
    """out = activation(gate) * up."""
    rows = _Rows(out)
    matrices = {"gate": rows.matrix(gate), "up": rows.matrix(up), "out": rows.dense(out)}
    rows.join_if_dense()
    rows.native.gated(
        **rows.sizes(),
        **matrices,
        activation=ACTIVATIONS[activation],
    )


def gated_backward(
    dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, activation: str
) -> None:
    """Write the gradients of ``gated``. dgate and dup are dense, or halves of a dense tensor."""
    rows = _Rows(dgate)
    matrices = {
        "dout": rows.matrix(dout),
        "gate": rows.matrix(gate),
        "up": rows.matrix(up),
        "dgate": rows.matrix(dgate),
        "dup": rows.matrix(dup),
    }
    rows.join_if_dense()
    rows.native.gated_backward(
        **rows.sizes(),
        **matrices,
        activation=ACTIVATIONS[activation],
    )


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    interleaved: bool,
    backward: bool,
) -> None:
    """Rotate the heads of q and k; ``backward`` rotates the other way."""
    native = dispatch.native()
    q, k, cos, sin = (dense_rows(x) for x in (q, k, cos, sin))
    batch, _, tokens, width = q.shape
    native.rope(
        batch=batch,
        tokens=tokens,
        width=width,
        rotary=cos.shape[-1],
        q=_heads(native, q),
        k=_heads(native, k),
        q_out=_heads(native, q_out),
        k_out=_heads(native, k_out),
        cos=_positions(native, cos),
        sin=_positions(native, sin),
        interleaved=interleaved,
        backward=backward,
        threads=torch.get_num_threads(),
    )


class _Rows:
    """Tensors as matrices with the rows of ``like``; keeps copies that must outlive the call."""

    def __init__(self, like: Tensor) -> None:
        self.native = dispatch.native()
        self.like = like
        self.cols = like.shape[-1]
        self.count = like.numel() // self.cols if self.cols else 0
        self._kept: list[Tensor] = []
        self._are_dense = True

    def sizes(self) -> dict[str, int]:
        """Arguments of every native function of rows."""
        return {"rows": self.count, "cols": self.cols, "threads": torch.get_num_threads()}

    def matrix(self, x: Tensor) -> Any:
        values, stride = as_rows(x, self.like)
        self._kept.append(values)
        self._are_dense = self._are_dense and stride == self.cols
        return self._matrix(values, stride)

    def optional(self, x: Tensor | None) -> Any:
        return None if x is None else self.matrix(x)

    def dense(self, x: Tensor) -> Any:
        return self._matrix(x, self.cols)

    def join_if_dense(self) -> None:
        """Makes one long row if all are dense: threads then share even narrow rows evenly."""
        if self._are_dense:
            self.cols = self.count * self.cols
            self.count = 1

    def _matrix(self, x: Tensor, stride: int) -> Any:
        return self.native.LayerMatrix(
            data=x.data_ptr(), bf16=x.dtype == torch.bfloat16, stride=stride
        )


def _heads(native: Any, x: Tensor) -> Any:
    return native.RopeHeads(
        data=x.data_ptr(),
        bf16=x.dtype == torch.bfloat16,
        heads=x.shape[1],
        batch_stride=x.stride(0),
        head_stride=x.stride(1),
        token_stride=x.stride(2),
    )


def _positions(native: Any, x: Tensor) -> Any:
    """cos or sin [B or 1, T, R], as if with one head."""
    return native.RopeHeads(
        data=x.data_ptr(),
        bf16=x.dtype == torch.bfloat16,
        heads=1,
        batch_stride=x.stride(0) if len(x) > 1 else 0,
        head_stride=0,
        token_stride=x.stride(1),
    )
