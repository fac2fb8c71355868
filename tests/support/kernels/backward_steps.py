"""A small model that is trained with updates after or inside the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from support.kernels.optimizer_runs import bits

from merit_fast.kernels.optimizer import FusedAdamW

Loop = Callable[..., None]
Make = Callable[[torch.nn.Module], tuple[torch.optim.Optimizer, Loop]]
Parameters = Sequence[torch.nn.Parameter]


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 7), torch.nn.Linear(7, 3)
    )
    return layers.to(dtype)


def loss_of(layers: Any, step: int, part: int = 0, scale: float = 1.0) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(100 * step + part)
    dtype = next(layers.parameters()).dtype
    rows = torch.randn(4, 5, generator=numbers).to(dtype)
    loss: torch.Tensor = layers(rows).float().square().sum() * scale
    return loss


def scheduled(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def run(
    make: Make, steps: int = 5, parts: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Parameters, Any]:
    """Parameters after steps of ``parts`` passes under a schedule."""
    layers = model(dtype)
    optimizer, loop = make(layers)
    schedule = scheduled(optimizer)
    for step in range(steps):
        loop(layers, optimizer, step, parts)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return list(layers.parameters()), optimizer


def accumulate(layers: Any, optimizer: Any, step: int, parts: int) -> None:
    """The passes of one step."""
    for part in range(parts):
        loss_of(layers, step, part, 1 / parts).backward()  # type: ignore[no-untyped-call]


def plain(**options: Any) -> Make:
    def make(layers: torch.nn.Module) -> tuple[FusedAdamW, Loop]:
        return FusedAdamW(layers.parameters(), lr=1e-2, **options), accumulate

    return make


def in_backward(
    loop: Loop = accumulate, clip: str | None = None, accumulation: int = 1, **options: Any
) -> Make:
    def make(layers: torch.nn.Module) -> tuple[FusedAdamW, Loop]:
        optimizer = FusedAdamW(layers.parameters(), lr=1e-2, **options)
        optimizer.step_in_backward(clip=clip, accumulation=accumulation)
        return optimizer, loop

    return make


def assert_equal(ours: Parameters, theirs: Parameters) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(bits(a), bits(b))
