"""The layers for ``bench.gpu``, forward and backward, against plain PyTorch in float64."""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu.cases import Case, Op, random, with_compiled
from bench.support.dtypes import DTYPES
from merit_fast.kernels.layers import add_rms_norm, geglu, rms_norm, rope, swiglu

EPSILON = 1e-6
Layer = Callable[..., Any]


def norm_formula(x: Tensor, weight: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype) * weight


def added_formula(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return norm_formula(total, weight), total


def rope_formula(cos: Tensor, sin: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates q and k [B, T, heads, R]."""
    cos = cos.to(q.dtype).unsqueeze(1)
    sin = sin.to(q.dtype).unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin

    return turned(q), turned(k)


def case(
    name: str,
    dtype: str,
    ours: Layer,
    formula: Layer,
    inputs: Sequence[Tensor],
    liger: Layer | None = None,
    timed: bool = False,
) -> Case:
    """One call of a layer; its results are the outputs and the gradients of all inputs."""
    outputs = _tuple(formula(*inputs))
    gradients = [torch.randn_like(y) for y in outputs]

    def step(layer: Layer, inputs: Sequence[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        results = _tuple(layer(*leaves))
        upstream = [g.to(y.dtype) for g, y in zip(gradients, results, strict=True)]
        return [*(y.detach() for y in results), *torch.autograd.grad(results, leaves, upstream)]

    peers: dict[str, Callable[[], Any]] = {}
    if timed:
        peers = with_compiled("eager", lambda: step(formula, inputs))
        if liger is not None and importlib.util.find_spec("liger_kernel"):
            peers["liger-kernel"] = lambda: step(liger, inputs)
    return Case(
        name,
        dtype,
        run=lambda backend: [
            y.contiguous() for y in step(functools.partial(ours, backend=backend), inputs)
        ],
        truth=lambda: step(formula, [x.double() for x in inputs]),
        peers=peers,
        moved_bytes=2 * sum(x.nbytes for x in inputs) + 2 * sum(y.nbytes for y in outputs),
        operations=sum(10 * x.numel() for x in inputs),
    )


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def liger_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, EPSILON)  # type: ignore[no-any-return]


def liger_added(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return liger_fused_add_rms_norm(x, residual, weight, EPSILON)  # type: ignore[no-any-return]


def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)  # type: ignore[no-any-return]


def liger_geglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_geglu

    return liger_geglu(gate, up)  # type: ignore[no-any-return]


def liger_rope(cos: Tensor, sin: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_rope

    return liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)  # type: ignore[no-any-return]


def norms(device: torch.device, *shapes: tuple[int, ...], timed: bool = False) -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in shapes:
            x = random(*shape, dtype=dtype, device=device)
            weight = random(shape[-1], dtype=dtype, device=device)
            ours = lambda x, w, backend: rms_norm(x, w, EPSILON, backend=backend)  # noqa: E731
            yield case(f"{list(shape)}", dtype, ours, norm_formula, [x, weight], liger_norm, timed)


def added(device: torch.device, *shapes: tuple[int, ...], timed: bool = False) -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in shapes:
            x, residual = (random(*shape, dtype=dtype, device=device) for _ in range(2))
            weight = random(shape[-1], dtype=dtype, device=device)
            ours = functools.partial(add_rms_norm, epsilon=EPSILON)
            yield case(
                f"{list(shape)}",
                dtype,
                ours,
                added_formula,
                [x, residual, weight],
                liger_added,
                timed,
            )


def gates(
    ours: Layer,
    formula: Layer,
    liger: Layer,
    device: torch.device,
    *shapes: tuple[int, ...],
    timed: bool = False,
) -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in shapes:
            inputs = [random(*shape, dtype=dtype, device=device) for _ in range(2)]
            yield case(f"{list(shape)}", dtype, ours, formula, inputs, liger, timed)
        if not timed:
            packed = random(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device)
            yield case("packed", dtype, ours, lambda x: formula(*x.chunk(2, -1)), [packed])


def ropes(device: torch.device, *shapes: tuple[int, ...], timed: bool = False) -> Iterator[Case]:
    """Cases of rotary positions; a shape is B, T, heads of q, heads of k, R."""
    for dtype in DTYPES:
        for batch, tokens, q_heads, k_heads, width in shapes:
            angles = 6 * torch.rand(1, tokens, width // 2, device=device).repeat(1, 1, 2)
            cos = angles.cos().to(DTYPES[dtype])
            sin = angles.sin().to(DTYPES[dtype])
            inputs = [
                random(batch, tokens, h, width, dtype=dtype, device=device)
                for h in (q_heads, k_heads)
            ]

            def ours(
                q: Tensor, k: Tensor, backend: str, cos: Tensor = cos, sin: Tensor = sin
            ) -> Any:
                return rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, backend=backend)

            formula, liger = (functools.partial(f, cos, sin) for f in (rope_formula, liger_rope))
            name = f"B={batch} T={tokens} {q_heads}/{k_heads} heads of {width}"
            yield case(name, dtype, ours, formula, inputs, liger, timed)


NORM_SHAPES = ((3, 37, 72), (5, 1003), (70, 9, 128))
GATE_SHAPES = ((3, 37, 72), (5, 1003), (40, 2))
ROPE_SHAPES = ((2, 37, 9, 3, 64), (1, 5, 2, 2, 14))
SWIGLU = functools.partial(gates, swiglu, lambda gate, up: F.silu(gate) * up, liger_swiglu)
GEGLU = functools.partial(
    gates, geglu, lambda gate, up: F.gelu(gate, approximate="tanh") * up, liger_geglu
)


def op(name: str, cases: Layer, small: Sequence[tuple[int, ...]], large: tuple[int, ...]) -> Op:
    return Op(
        name,
        name,
        lambda device: cases(device, *small),
        lambda device: cases(device, large, timed=True),
    )


LAYERS = [
    op("rms_norm", norms, NORM_SHAPES, (8192, 4096)),
    op("add_rms_norm", added, NORM_SHAPES, (8192, 4096)),
    op("swiglu", SWIGLU, GATE_SHAPES, (8192, 11008)),
    op("geglu", GEGLU, GATE_SHAPES, (8192, 11008)),
    op("rope", ropes, ROPE_SHAPES, (4, 2048, 32, 8, 128)),
]
