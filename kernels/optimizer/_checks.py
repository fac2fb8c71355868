"""Checks of parameters, their groups and their gradients."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.optimizer._state import is_dense

DTYPES = (torch.float32, torch.bfloat16)


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError for an option out of range, TypeError for a parameter of another dtype."""
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"FusedAdamW: {name} must be at least 0, got {group[name]}")
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"FusedAdamW: betas must be from 0 to below 1, got {group['betas']}")
    for parameter in group["params"]:
        if parameter.dtype not in DTYPES:
            raise TypeError(
                f"FusedAdamW: parameters must be float32 or bfloat16, got {parameter.dtype}"
            )


def refuse_overlaps(parameters: Iterable[Tensor]) -> None:
    """Raises ValueError for dense parameters that share memory: threads would write it at once."""
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.itemsize)
        for p in parameters
        if p.numel() and p.device.type != "meta" and is_dense(p)
    )
    for (_, stop), (start, _) in zip(spans, spans[1:], strict=False):
        if start < stop:
            raise ValueError(
                "FusedAdamW: parameters must not overlap in memory; give a tied weight once"
            )


def checked_grad(parameter: Tensor) -> Tensor:
    """The parameter's gradient, detached."""
    grad = parameter.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise ValueError(
            f"FusedAdamW: gradients must be dense, got {grad.layout} of shape {list(grad.shape)}"
        )
    if grad.dtype not in DTYPES:
        raise TypeError(f"FusedAdamW: gradients must be float32 or bfloat16, got {grad.dtype}")
    return grad.detach()
