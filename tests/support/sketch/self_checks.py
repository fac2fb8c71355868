"""Models that are made twice alike, and their sketches with and without hooks."""

from collections.abc import Callable

import torch
from support.sketch.exact_gradients import sketch_of_loss
from torch import Tensor, nn

from merit_fast.sketch.gradients import GradientSketcher


def loss_of(output: Tensor) -> Tensor:
    return (output.square() * torch.linspace(0.5, 2, output.shape[-1])).sum()


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def exact_rows(make: Callable[[], nn.Module], x: Tensor) -> Tensor:
    """Each example's gradient, by the only forward pass of a model that is as the others."""
    rows = []
    for row in x:
        model = made(make)

        def loss(model: nn.Module = model, row: Tensor = row) -> Tensor:
            return loss_of(model(row[None]))

        rows.append(sketch_of_loss(model, loss))
    return torch.cat(rows)


def sketched(sketcher: GradientSketcher, model: nn.Module, x: Tensor) -> Tensor:
    loss_of(model(x)).backward()  # type: ignore[no-untyped-call]
    return sketcher.take()
