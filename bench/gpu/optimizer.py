"""AdamW for ``bench.gpu``: one step from the same numbers; the results are the weights."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from bench.gpu.cases import Case, Op, random
from bench.support.dtypes import DTYPES
from merit_fast.kernels.optimizer import FusedAdamW

SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
SIZES = [1, 7, 1023, 1024, 1025, 3201, 33]
# Bytes per element that every implementation moves next to weight and gradient: the moments
STATE_BYTES = {"fp32": 16, "bf16": 8, "int8": 4}


def parameters(
    values: list[Tensor], gradients: list[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    copies: list[Tensor] = [
        torch.nn.Parameter(value.to(dtype or value.dtype, copy=True)) for value in values
    ]
    for parameter, gradient in zip(copies, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    return copies


def case(
    name: str,
    sizes: list[tuple[int, ...]],
    dtype: str,
    device: torch.device,
    timed: bool,
    **options: Any,
) -> Case:
    values, gradients = (
        [random(*size, dtype=dtype, device=device) for size in sizes] for _ in range(2)
    )

    def run(backend: str) -> list[Tensor]:
        """Weights after a step, rounded to nearest, since stochastic rounding has no one truth."""
        weights = parameters(values, gradients)
        FusedAdamW(weights, **SETTINGS, rounding="nearest", backend=backend, **options).step()
        return [weight.detach() for weight in weights]

    def truth() -> list[Tensor]:
        weights = parameters(values, gradients, torch.float64)
        if "max_norm" in options:
            torch.nn.utils.clip_grad_norm_(weights, options["max_norm"])
        torch.optim.AdamW(weights, **SETTINGS).step()
        return [weight.detach() for weight in weights]

    elements = sum(value.numel() for value in values)
    moved = elements * (STATE_BYTES[options.get("moments", "fp32")] + 3 * DTYPES[dtype].itemsize)
    return Case(
        name,
        dtype,
        run,
        truth,
        _peers(values, gradients, options) if timed else {},
        moved,
        16 * elements,
    )


def _peers(
    values: list[Tensor], gradients: list[Tensor], options: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """Steps of optimizers that exist already; ``run`` also makes weights and states."""

    def step(make: Callable[..., Any], **more: Any) -> Callable[[], Any]:
        optimizer: Any = make(parameters(values, gradients), **SETTINGS, **more)
        return cast(Callable[[], Any], optimizer.step)

    return {
        "torch fused": step(torch.optim.AdamW, fused=True),
        "torch foreach": step(torch.optim.AdamW, foreach=True),
        "a step": step(FusedAdamW, **options),
    }


def small(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        sizes: list[tuple[int, ...]] = [(n,) for n in SIZES]
        yield case("7 ragged tensors", sizes, dtype, device, False)
        yield case("7 ragged tensors, bf16 moments", sizes, dtype, device, False, moments="bf16")
        yield case("7 ragged tensors, clipped", sizes, dtype, device, False, max_norm=1.0)
        yield case("7 ragged tensors, fp32 master", sizes, dtype, device, False, master="fp32")


def large(device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        yield case("32 x [2048, 2048]", [(2048, 2048)] * 32, dtype, device, True)


ADAMW = Op("adamw", "adamw", small, large)
