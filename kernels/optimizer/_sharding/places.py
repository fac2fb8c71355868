"""Parameters that are spread over processes: local parts and their places.

DTensors hold rows (FSDP2), columns (tensor parallelism) or copies of a whole parameter. Elements
of a whole parameter are numbered in row-major order.
"""

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Elements of a local part that follow one another in the whole parameter too."""

    first: int  # index in the whole parameter
    start: int  # index in the local part
    length: int


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. A process that never loaded them has none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` in this process, which shares its memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def like(parameter: Tensor, part: Tensor) -> Tensor:
    """A tensor with the mesh and placements of ``parameter`` whose local part is ``part``."""
    if not is_sharded(parameter):
        return part
    return wrapped(parameter, part, parameter.shape)


def wrapped(parameter: Any, part: Tensor, shape: Sequence[int]) -> Tensor:
    """A DTensor of ``shape`` with the mesh and placements of a DTensor."""
    with torch.no_grad():
        made: Tensor = type(parameter.data).from_local(
            part,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=row_major_strides(shape),
        )
    return made


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if len(shape) else ()


def moved_onto(parameter: Any, value: Any) -> Tensor:
    """``value`` with the mesh and placements of ``parameter``, or whole if that is not sharded."""
    if not is_sharded(parameter):
        return whole(value)
    if not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(
            value.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            src_data_rank=None,
        )
    if value.device_mesh == parameter.device_mesh and value.placements == parameter.placements:
        return value  # type: ignore[no-any-return]
    sent = _sendable(value)
    moved: Tensor = sent.redistribute(parameter.device_mesh, parameter.placements).to(value.dtype)
    return moved


def whole(value: Any) -> Tensor:
    """All elements of a tensor that may be sharded."""
    if not is_sharded(value):
        return value  # type: ignore[no-any-return]
    gathered: Tensor = _sendable(value).full_tensor()
    return gathered.to(value.dtype)


def _sendable(value: Any) -> Any:
    """``value`` in a dtype that gloo and NCCL can send: they have no int16."""
    return value.to(torch.int32) if value.dtype == torch.int16 else value


def sharding_dims(parameter: Any) -> tuple[int, ...]:
    """Dims of the mesh over which the parameter's elements are spread."""
    placements = enumerate(parameter.placements)
    return tuple(dim for dim, placement in placements if not placement.is_replicate())


def runs(parameter: Any) -> tuple[Run, ...]:
    """The local part as runs of the whole parameter, in order.

    Raises:
        ValueError: the parameter is sharded in a way that says nothing of its elements' places.
    """
    for placement in parameter.placements:
        if type(placement).__name__ not in ("Shard", "Replicate"):
            raise ValueError(
                "FusedAdamW: stochastic rounding needs the place of every element, which "
                f"{placement} of a parameter of shape {list(parameter.shape)} does not give; "
                'pass rounding="nearest" or a master'
            )
    return _runs(tuple(parameter.shape), parameter.device_mesh, parameter.placements)


@lru_cache(maxsize=65536)
def _runs(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> tuple[Run, ...]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return runs_of_block(shape, tuple(map(int, sizes)), tuple(map(int, offsets)))


def runs_of_block(
    shape: tuple[int, ...], sizes: tuple[int, ...], offsets: tuple[int, ...]
) -> tuple[Run, ...]:
    """Runs of the block of ``sizes`` that begins at ``offsets`` in a tensor of ``shape``."""
    count = 1
    for size in sizes:
        count *= size
    if not count:
        return ()
    firsts = [0]
    strides = row_major_strides(shape)
    # Dims behind ``outer`` are whole, so one run covers them and the part of dim ``outer``.
    outer = len(shape) - 1
    while outer > 0 and sizes[outer] == shape[outer]:
        outer -= 1
    for dim in range(len(shape)):
        steps = sizes[dim] if dim < outer else 1
        indices = range(offsets[dim], offsets[dim] + steps)
        firsts = [first + index * strides[dim] for first in firsts for index in indices]
    length = count // len(firsts)
    return tuple(Run(first, k * length, length) for k, first in enumerate(firsts))


def shard_number(shard_group: Any) -> int | None:
    """The number of this process in ``shard_group``; None without one.

    Raises:
        ValueError: this process is not in the group.
    """
    if shard_group is None:
        return None
    import torch.distributed as dist

    rank = dist.get_rank(shard_group)
    if rank < 0:
        raise ValueError("FusedAdamW: this process is not in shard_group")
    return rank


def world_size() -> int:
    """Number of processes of torch.distributed; 1 where it is not set up."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return 1
    return int(dist.get_world_size())
