"""Checks of parameters, their groups and their gradients."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.optimizer._sharding import places
from merit_fast.kernels.optimizer._state import Options, is_dense

DTYPES = (torch.float32, torch.bfloat16)
# Options that groups cannot set.
OF_OPTIMIZER = (
    "rounding",
    "master",
    "moments",
    "average_decay",
    "max_norm",
    "zero_grad",
    "seed",
    "skip_nonfinite",
    "shard_group",
    "backend",
)
CLIPS = (None, "previous", "two-pass")


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError for an option out of range, TypeError for a parameter of another dtype."""
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"FusedAdamW: {name} must be at least 0, got {group[name]}")
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"FusedAdamW: betas must be from 0 to below 1, got {group['betas']}")
    for parameter in group["params"]:
        if parameter.dtype == torch.float16:
            raise TypeError(
                "FusedAdamW: parameters must be float32 or bfloat16, got torch.float16, whose "
                "range is too small for gradients; load the model in bfloat16"
            )
        if parameter.dtype not in DTYPES:
            raise TypeError(
                f"FusedAdamW: parameters must be float32 or bfloat16, got {parameter.dtype}"
            )


def take_options(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Removes the optimizer's options from a group, where ZeroRedundancyOptimizer puts them.

    Raises:
        ValueError: a group has another value, which nothing would read.
    """
    for name in OF_OPTIMIZER:
        if name in group and group.pop(name) != values[name]:
            raise ValueError(
                f"FusedAdamW: {name} is an option of the optimizer, not of a group of parameters"
            )


def refuse_overlaps(parameters: Iterable[Tensor]) -> None:
    """Raises ValueError for dense parameters that share memory: threads would write it at once."""
    parts = [places.local(parameter) for parameter in parameters]
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.itemsize)
        for p in parts
        if p.numel() and p.device.type != "meta" and is_dense(p)
    )
    for (_, stop), (start, _) in zip(spans, spans[1:], strict=False):
        if start < stop:
            raise ValueError(
                "FusedAdamW: parameters must not overlap in memory; give a tied weight once"
            )


def local_grad(parameter: Tensor) -> Tensor:
    """The local part of the parameter's gradient, detached.

    A gradient with other placements than its parameter, such as unreduced sums, is moved first.
    """
    grad = parameter.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise ValueError(
            f"FusedAdamW: gradients must be dense, got {grad.layout} of shape {list(grad.shape)}"
        )
    if grad.dtype not in DTYPES:
        raise TypeError(f"FusedAdamW: gradients must be float32 or bfloat16, got {grad.dtype}")
    if places.is_sharded(parameter) != places.is_sharded(grad):
        raise ValueError(
            "FusedAdamW: a parameter and its gradient must both be DTensors or both be plain, got "
            f"{type(parameter.data).__name__} and {type(grad).__name__}"
        )
    return places.local(places.moved_onto(parameter, grad.detach()))


def check_in_backward(
    parameters: Sequence[Tensor],
    options: Options,
    clip: str | None,
    accumulation: int,
    ddp: Any,
    reduced: bool,
) -> None:
    """Raises ValueError for arguments of ``step_in_backward`` that would update wrongly."""
    if clip not in CLIPS:
        raise ValueError(f'FusedAdamW: clip must be None, "previous" or "two-pass", got {clip!r}')
    if accumulation < 1:
        raise ValueError(f"FusedAdamW: accumulation must be at least 1, got {accumulation}")
    if options.max_norm and clip is None:
        raise ValueError(
            "FusedAdamW: the norm of all gradients is known only after the backward pass, so "
            'step_in_backward with max_norm needs clip="previous" or clip="two-pass"; got '
            f"max_norm={options.max_norm}"
        )
    if clip is not None and not options.max_norm:
        raise ValueError(f"FusedAdamW: clip={clip!r} needs max_norm above 0 (inf only measures)")
    if options.skip_nonfinite and clip != "two-pass":
        raise ValueError(
            'FusedAdamW: step_in_backward with skip_nonfinite needs clip="two-pass": without it '
            "weights are updated before all gradients are known"
        )
    plain = any(not places.is_sharded(parameter) for parameter in parameters)
    if plain and ddp is None and not reduced and places.world_size() > 1:
        raise ValueError(
            "FusedAdamW: hooks see plain gradients before they are reduced over the processes; "
            "pass ddp= (the DistributedDataParallel), or reduced=True if they need no reduction. "
            "FSDP1 and ZeroRedundancyOptimizer cannot update inside the backward pass"
        )


def check_not_replaced(
    parameter: Tensor, known: Sequence[Tensor], states: Mapping[Any, Any]
) -> None:
    """Raises ValueError for a new parameter in the place of one that has a state."""
    ids = {id(other) for other in known}
    for other, state in states.items():
        if id(other) not in ids and state and other.shape == parameter.shape:
            raise ValueError(
                f"FusedAdamW: a parameter of shape {list(parameter.shape)} was replaced after the "
                "first step, which loses its state; make a new optimizer and load the state dict, "
                "or delete optimizer.state of the old parameter"
            )
