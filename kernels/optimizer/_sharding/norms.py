"""Norms of gradients: sums of squares in float64, over the processes that hold the shards."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.optimizer import _ops
from merit_fast.kernels.optimizer._checks import local_grad
from merit_fast.kernels.optimizer._sharding import places
from merit_fast.kernels.optimizer._state import is_dense

Sums = Sequence[tuple[Tensor, Tensor]]  # a parameter and a float64 sum of squares of local parts


def square_sums(parameters: Iterable[Tensor], backend: str | None) -> Sums:
    """Sums of squares of local gradients, each with a parameter whose spread and device it has."""
    kinds: dict[Any, tuple[Tensor, list[Tensor]]] = {}
    for parameter in parameters:
        grad = local_grad(parameter)
        grad = grad if is_dense(grad) else grad.contiguous()
        kind = (_spread_of(parameter), grad.device, grad.dtype)
        kinds.setdefault(kind, (parameter, []))[1].append(grad)
    return [
        (parameter, _ops.grad_square_sum(grads, backend)) for parameter, grads in kinds.values()
    ]


def clip_factors(
    parameters: Iterable[Tensor], norm: Tensor | float, max_norm: float
) -> dict[torch.device, Tensor]:
    """Float32 factors for the gradients of each device, whose norm is ``norm``.

    There is none for 0, and none for infinity: a norm that is not finite would make it NaN.
    """
    if not 0 < max_norm < float("inf"):
        return {}
    factor = (max_norm / (torch.as_tensor(norm) + 1e-6)).clamp(max=1.0).float()
    devices = {places.local(parameter).device for parameter in parameters}
    return {device: factor.to(device) for device in devices}


def total_square_sum(
    parameters: Iterable[Tensor],
    sums: Sums,
    shard_group: Any,
    compare: bool,
) -> Tensor:
    """Float64 scalar: the sum of squares of whole gradients, from those of local parts.

    Shards are added over their mesh, copies count once. Every process takes part in every
    reduction, also where it holds no gradient.

    Args:
        parameters: all parameters of the optimizer, the same ones in every process.
        sums: parameters and the float64 sums of squares of their local gradients.
        shard_group: the processes over which plain tensors are sharded, or None.
        compare: whether plain tensors without a group must have one norm in all processes.

    Raises:
        ValueError: with ``compare``, plain gradients differ among the processes.
    """
    totals: dict[Any, Tensor] = {}
    everything = list(parameters)
    if not everything:  # as ZeroRedundancyOptimizer may leave a process, which takes part too
        totals[None, ()] = torch.zeros((), dtype=torch.float64, device=_device_of(shard_group))
    for parameter in everything:
        spread = _spread_of(parameter)
        if spread not in totals:
            totals[spread] = _zero(parameter)
    for parameter, value in sums:
        key = _spread_of(parameter)
        totals[key] = totals[key] + value.to(totals[key].device)
    total: Tensor | None = None
    for (mesh, dims), value in totals.items():
        whole = value
        for dim in dims:
            whole = _reduced(whole, mesh.get_group(dim))
        if mesh is None and shard_group is not None:
            whole = _reduced(whole, shard_group)
        elif mesh is None and compare and places.world_size() > 1:
            _check_equal(whole)
        total = whole if total is None else total + whole.to(total.device)
    return torch.zeros((), dtype=torch.float64) if total is None else total


def _device_of(group: Any) -> str:
    """Kind of device whose tensors the processes can send."""
    if places.world_size() == 1:
        return "cpu"
    import torch.distributed as dist

    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"


def _spread_of(parameter: Any) -> tuple[Any, tuple[int, ...]]:
    if not places.is_sharded(parameter):
        return None, ()
    return parameter.device_mesh, places.sharding_dims(parameter)


def _zero(parameter: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=places.local(parameter).device)


def _reduced(value: Tensor, group: Any) -> Tensor:
    import torch.distributed as dist

    value = value.clone()
    dist.all_reduce(value, group=group)
    return value


def _check_equal(value: Tensor) -> None:
    """Raises ValueError in every process if a sum of squares is not the same in all of them."""
    import torch.distributed as dist

    finite = value.isfinite()
    size = torch.where(finite, value, 0.0)
    most = torch.stack([size, -size, finite.double(), -finite.double()])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    largest, smallest, any_finite, all_finite = most.tolist()
    if largest != -smallest or any_finite != -all_finite:
        raise ValueError(
            "FusedAdamW: the norm of the gradients differs between processes "
            f"({(-smallest) ** 0.5:.6g} to {largest**0.5:.6g}), so they are shards or were not "
            "reduced. For shards (FSDP1, ZeroRedundancyOptimizer) pass shard_group=, over which "
            "they are spread; for a model of only this process, a group of this process"
        )
