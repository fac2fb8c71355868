"""Calls of the layers with relevant shapes, layouts and dtypes, for the tests of every backend."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.layers import add_rms_norm, geglu, rms_norm, rope, swiglu

F32 = torch.float32
BF16 = torch.bfloat16
WIDTHS = (1, 7, 72, 576, 1003)
NORM_WIDTHS = (
    2,
    *WIDTHS[1:],
)  # of one column nothing is left of the gradient but what rounding leaves


@dataclass(frozen=True)
class LayerCase:
    """``run(*inputs, backend=...)`` and its inputs; the first ``differentiated`` have gradients."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Callable[[torch.dtype], Sequence[Tensor]]
    differentiated: int


def results(case: LayerCase, inputs: Sequence[Tensor], backend: str, seed: int = 5) -> list[Tensor]:
    """Outputs, and gradients of all differentiated inputs for random output gradients, detached."""
    leaves = [
        x.detach().requires_grad_() if i < case.differentiated else x for i, x in enumerate(inputs)
    ]
    outputs = case.run(*leaves, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs
    ]  # exact in all
    gradients = torch.autograd.grad(outputs, leaves[: case.differentiated], weights)
    return [*(y.detach() for y in outputs), *gradients]


def compared(
    case: LayerCase, dtype: torch.dtype, backend: str, draws: int = 1
) -> Iterator[tuple[Tensor, ...]]:
    """Ours, eager's and the truth in float64 for every output and gradient, all draws together.

    Several draws, since a few numbers rounded to bf16 may favour eager by chance.
    """
    drawn: list[list[list[Tensor]]] = []
    for seed in range(draws):
        torch.manual_seed(seed)
        inputs = case.inputs(dtype)
        wide = [x.double() for x in inputs]
        drawn.append(
            [
                results(case, inputs, backend),
                results(case, inputs, "eager"),
                results(case, wide, "eager"),
            ]
        )
        for ours, eager in zip(*drawn[-1][:2], strict=True):
            assert ours.dtype == eager.dtype and ours.shape == eager.shape
    for together in zip(*(zip(*draw, strict=True) for draw in drawn), strict=True):
        yield tuple(
            torch.cat([x.flatten() for x in column]) for column in zip(*together, strict=True)
        )


def _heads(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, tokens, heads, width).to(dtype).transpose(1, 2)


def _norm(shape: tuple[int, ...], **options: Any) -> LayerCase:
    def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)

    return LayerCase(
        lambda x, w, backend: rms_norm(x, w, 1e-6, backend=backend, **options), inputs, 2
    )


def _added(shape: tuple[int, ...], **options: Any) -> LayerCase:
    def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.randn(shape).to(dtype),
            torch.randn(shape).to(dtype),
            torch.randn(shape[-1]).to(dtype),
        )

    return LayerCase(
        lambda x, r, w, backend: add_rms_norm(x, r, w, 1e-6, backend=backend, **options), inputs, 3
    )


def _gated(shape: tuple[int, ...], function: Callable[..., Tensor], **options: Any) -> LayerCase:
    def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return 2 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)

    return LayerCase(lambda g, u, backend: function(g, u, backend=backend, **options), inputs, 2)


def _packed(shape: tuple[int, ...], function: Callable[..., Tensor], **options: Any) -> LayerCase:
    def inputs(dtype: torch.dtype) -> tuple[Tensor]:
        return ((2 * torch.randn(*shape[:-1], 2 * shape[-1])).to(dtype),)

    return LayerCase(lambda g, backend: function(g, backend=backend, **options), inputs, 1)


def _rope(
    batch: int,
    tokens: int,
    q_heads: int,
    k_heads: int,
    width: int,
    rotary: int | None = None,
    one_row: bool = True,
    **options: Any,
) -> LayerCase:
    def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        angles = torch.rand(1 if one_row else batch, tokens, rotary or width) * 6
        q, k = (_heads(batch, tokens, heads, width, dtype) for heads in (q_heads, k_heads))
        return q, k, angles.cos().to(dtype), angles.sin().to(dtype)

    return LayerCase(functools.partial(rope, **options), inputs, 2)


GEMMA: dict[str, Any] = {"casting": "gemma", "offset": 1.0}
CASES: dict[str, LayerCase] = {
    **{f"norm of {w}": _norm((3, 7, w)) for w in NORM_WIDTHS},
    **{f"gemma's norm of {w}": _norm((5, w), **GEMMA) for w in (7, 576)},
    "norm of one row": _norm((72,)),
    "norm of 40 rows": _norm((40, 33)),
    "norm of 9000": _norm((3, 9000)),
    **{f"add and norm of {w}": _added((3, 7, w)) for w in NORM_WIDTHS},
    "add and gemma's norm": _added((3, 7, 72), **GEMMA),
    **{f"swiglu of {w}": _gated((3, 5, w), swiglu) for w in WIDTHS},
    **{f"geglu of {w}": _gated((3, 5, w), geglu) for w in (7, 1003)},
    **{f"geglu by erf of {w}": _gated((3, 5, w), geglu, approximate="none") for w in (7, 1003)},
    **{f"packed swiglu of {w}": _packed((3, 5, w), swiglu) for w in WIDTHS},
    "packed geglu": _packed((3, 5, 72), geglu),
    "rope": _rope(2, 7, 9, 3, 64),
    "rope of the smallest head": _rope(1, 3, 1, 1, 2),
    "rope, ragged, a row of cosines each": _rope(2, 9, 5, 2, 14, one_row=False),
    "partial rope": _rope(2, 5, 4, 4, 40, rotary=10),
    "interleaved rope": _rope(2, 7, 9, 3, 64, interleaved=True),
    "interleaved, partial rope": _rope(2, 5, 3, 1, 40, rotary=10, one_row=False, interleaved=True),
}
