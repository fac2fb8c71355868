"""Losses and gradients of a model with and without our kernels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def loss_and_gradients(
    model: nn.Module, batch: Mapping[str, Any], **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**batch, **options)
    output.loss.backward()
    return output, {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same_gradients(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], floor: float = 1e-5
) -> None:
    assert actual.keys() == expected.keys()
    squares = (g.double().square().sum() for g in expected.values())
    total = sum(squares, torch.zeros((), dtype=torch.float64)).sqrt()
    for name, gradient in expected.items():
        error = (actual[name].double() - gradient.double()).norm()
        assert error <= floor * (gradient.double().norm() + 0.01 * total), name
