"""Launches of the layers' Triton kernels at the sizes of models, for the gate and code tests."""

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from support.gpu.code import GpuLaunch
from torch import Tensor

from merit_fast.kernels.layers import (
    _triton,
    add_rms_norm,
    geglu,
    rms_norm,
    rope,
    swiglu,
)

KERNELS = (
    "norm_kernel",
    "norm_backward_kernel",
    "gated_kernel",
    "gated_backward_kernel",
    "rope_kernel",
)
BF16 = torch.bfloat16
F32 = torch.float32


def launches() -> list[GpuLaunch]:
    return [
        *norm("norm, bf16, 4096", BF16, 4096),
        *norm("norm, fp32, 128", F32, 128),
        *norm("norm, fp32, 4096", F32, 4096),
        *norm("norm, fp32, 16384", F32, 16384),
        *norm("norm of heads, bf16, 128", BF16, 128),
        *norm("norm, bf16, ragged", BF16, 1003),
        *pair(
            "add and norm, bf16, 4096",
            lambda x, r, w: add_rms_norm(x, r, w, 1e-6)[0],
            [(8, 4096)] * 2 + [(4096,)],
        ),
        *pair("swiglu, bf16", swiglu, [(8, 11008)] * 2),
        *pair("swiglu, packed, bf16", swiglu, [(8, 2 * 11008)]),
        *pair("geglu, fp32", geglu, [(8, 11008)] * 2, F32),
        *pair("geglu by erf, bf16", geglu_by_erf, [(8, 11008)] * 2),
        *pair("geglu, bf16, 4096", geglu, [(8, 4096)] * 2),
        *pair("geglu by erf, bf16, 4096", geglu_by_erf, [(8, 4096)] * 2),
        *heads("rope, bf16, 128", BF16, 128, 128),
        *heads("rope, fp32, 64", F32, 64, 64),
        *heads("rope, bf16, partial", BF16, 80, 32),
        *heads("rope, interleaved, bf16, 128", BF16, 128, 128, interleaved=True),
        *heads("rope, bf16, partial, fills no tile", BF16, 80, 20),
        *ones(),
    ]


def geglu_by_erf(gate: Tensor, up: Tensor) -> Tensor:
    return geglu(gate, up, approximate="none")


def ones() -> list[GpuLaunch]:
    """Rows, columns, strides, heads and tokens of 1, of which Triton makes constants."""
    return [
        *norm("norm of one", F32, 1),
        *pair("swiglu of one", swiglu, [(1, 1)] * 2),
        *pair("packed swiglu of one", swiglu, [(1, 2)]),
        *heads("rope of one pair", F32, 2, 2),
    ]


def norm(name: str, dtype: torch.dtype, columns: int) -> list[GpuLaunch]:
    return pair(name, lambda x, w: rms_norm(x, w, 1e-6), [(8, columns), (columns,)], dtype)


def heads(
    name: str, dtype: torch.dtype, width: int, rotary: int, interleaved: bool = False
) -> list[GpuLaunch]:
    positions = torch.zeros(1, 4, rotary, dtype=dtype)

    def turn(q: Tensor, k: Tensor) -> Tensor:
        heads_of = (q.transpose(1, 2), k.transpose(1, 2))
        return rope(*heads_of, positions, positions, interleaved=interleaved)[0]

    return pair(name, turn, [(2, 4, 32, width), (2, 4, 8, width)], dtype)


def pair(
    name: str,
    call: Callable[..., Tensor],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = BF16,
) -> list[GpuLaunch]:
    """The launches of forward and backward; nothing runs."""
    inputs = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    recorded: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        def __init__(self, of: str) -> None:
            self.of = of

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, **options: recorded.append((self.of, arguments, options))

    recorders: dict[str, Any] = {kernel: Recorder(kernel) for kernel in KERNELS}
    with (
        mock.patch.multiple(_triton, **recorders),
        mock.patch("merit_fast.kernels.dispatch.unavailable", lambda *asked: None),
        mock.patch.dict("os.environ", {"MERIT_FAST_BACKEND": "triton"}),
    ):
        call(*inputs).sum().backward()  # type: ignore[no-untyped-call]
    return [
        GpuLaunch(f"{name}, {direction}", getattr(_triton, kernel), arguments, options)
        for direction, (kernel, arguments, options) in zip(
            ("forward", "backward"), recorded, strict=True
        )
    ]
