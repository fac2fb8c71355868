"""Tensor parallelism: each process has a slice of a layer's weight, input or output.

For y = x W^T the gradient dy^T x is divided as dy or x is:

    columnwise, W = [W_1; W_2; ...]:   W_k has the gradient dy_k^T x, its rows of the whole's
    rowwise,    W = [W_1, W_2, ...]:   W_k has the gradient dy^T x_k, its columns

A sketch is linear, so each process sketches its slice at its place, and the sum is the whole's.
What all processes have alike, the first one counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from merit_fast.errors import MeritFastError
from merit_fast.sketch.divided.places import is_fsdp2, places_of

_UNLIKE = 0.02  # relative difference of gradients that should be equal in all processes


@dataclass(frozen=True)
class LocalPart:
    """One process's part of a tensor [..., C].

    Attributes:
        values: [..., c], the columns from ``first`` on.
        width: C.
        is_whole: every process has all columns.
    """

    values: Tensor
    first: int
    width: int
    is_whole: bool

    @classmethod
    def of(cls, value: Any) -> "LocalPart":
        """The part of a DTensor that is divided in its last dimension only, or a plain tensor.

        Raises:
            MeritFastError: it is divided in another way.
        """
        if not hasattr(value, "device_mesh"):
            return cls(value, 0, value.shape[-1], True)
        (placement,) = value.placements
        if placement.is_partial():
            value = value.full_tensor()
            return cls(value, 0, value.shape[-1], True)
        width = value.shape[-1]
        local = value.to_local()
        if placement.is_replicate():
            return cls(local, 0, width, True)
        if placement.is_shard(value.dim() - 1):
            each = -(-width // value.device_mesh.size())
            first = min(value.device_mesh.get_local_rank() * each, width)
            return cls(local, first, width, False)
        raise MeritFastError(
            "sketch_gradients: activations are divided among processes by their tokens "
            f"({placement}): sequence parallelism is not sketched"
        )

    def padded(self) -> Tensor:
        """[..., C], 0 where other processes have the values."""
        rest = self.width - self.first - self.values.shape[-1]
        return self.values if self.is_whole else F.pad(self.values, (self.first, rest))


def counts_once(value: Any) -> bool:
    """Whether this process counts what all have alike: the first one."""
    return not hasattr(value, "device_mesh") or bool(value.device_mesh.get_local_rank() == 0)


class Slices:
    """The processes among which tensor parallelism divides a model; none by default.

    Args:
        names: of the sketched parameters by id.

    Attributes:
        elsewhere: sketched parameters that another process counts.

    Raises:
        MeritFastError: parameters are divided among different processes, or in layers whose slices
            are not known.
    """

    def __init__(self, model: nn.Module, names: Mapping[int, str]) -> None:
        self._group: Any = None
        self.elsewhere: set[str] = set()
        gathered = {id(p) for m in model.modules() if is_fsdp2(m) for p in m.parameters()}
        alike = set[str]()
        for place in places_of(model):
            parameter: Any = place.parameter
            name = names.get(id(parameter))
            if not hasattr(parameter, "device_mesh") or id(parameter) in gathered:
                alike.update(() if name is None else (name,))
                continue
            group = parameter.device_mesh.get_group(0)
            members = dist.get_process_group_ranks(group)
            if self._group is None:
                self._group = group
            elif members != dist.get_process_group_ranks(self._group):
                raise MeritFastError(
                    f"sketch_gradients: parameter {place.name} must be divided among the same "
                    f"processes as the others, got {members}"
                )
        if self._group is not None and dist.get_rank(self._group) > 0:
            self.elsewhere = alike

    @property
    def is_divided(self) -> bool:
        return self._group is not None

    def summed(self, value: Tensor) -> Tensor:
        """The sum over the processes: the same bits in each."""
        if self._group is None:
            return value
        total = value.clone()
        dist.all_reduce(total, group=self._group)
        return total

    def require_plain(self, is_multiplied: object, check: str) -> None:
        """Checks that gradients are neither multiplied nor collected, and that they are checked.

        Only the check finds a parameter of which each process has a part of the gradient.
        """
        if self._group is None:
            return
        if is_multiplied:
            raise MeritFastError(
                "sketch_gradients: normalize and kfac_factors take no model of tensor parallelism"
            )
        if check == "never":
            raise MeritFastError(
                "check: must be 'first' or 'always' for a model of tensor parallelism, got 'never'"
            )

    def require_own(self, group: Any) -> None:
        """Raises MeritFastError if a sum over ``group`` would count this group's sums twice."""
        if self._group is None:
            return
        members = {*dist.get_process_group_ranks(self._group)}
        if len(members & {*dist.get_process_group_ranks(group or dist.group.WORLD)}) > 1:
            raise MeritFastError(
                "sum_over_processes: processes of tensor parallelism have equal sums: group must "
                "hold one of them only"
            )

    def require_alike(self, name: str, exact: Tensor) -> None:
        """Checks that all processes have one gradient of a parameter.

        Raises:
            MeritFastError: each has a part of it, which their sum would not be.
        """
        if self._group is None:
            return
        mean = self.summed(exact) / dist.get_world_size(self._group)
        distance = torch.stack([(mean - exact).norm(), -exact.norm()])
        dist.all_reduce(distance, op=dist.ReduceOp.MAX, group=self._group)
        if float(distance[0]) > _UNLIKE * -float(distance[1]):
            raise MeritFastError(
                f"sketch_gradients: parameter {name} must have one gradient in all processes of "
                "tensor parallelism, but each has another: it works on slices of activations; "
                "leave it out"
            )
