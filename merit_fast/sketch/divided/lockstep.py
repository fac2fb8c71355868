"""Processes that gather parameters together, and so must run the same backward passes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from merit_fast.errors import MeritFastError


class Lockstep:
    """The processes among which FSDP2 divides the sketched parameters; one process otherwise.

    Args:
        parameters: the sketched ones.

    Raises:
        MeritFastError: two parameters are divided among different processes.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._group: Any = None
        members: list[int] = []
        first = ""
        for name, parameter in parameters:
            group = _shard_group(parameter)
            if group is None:
                continue
            if self._group is None:
                self._group = group
                members = dist.get_process_group_ranks(group)
                first = name
            elif dist.get_process_group_ranks(group) != members:
                raise MeritFastError(
                    f"sketch_gradients: parameters {first} and {name} must be divided among the "
                    f"same processes, got {members} and {dist.get_process_group_ranks(group)}"
                )

    @property
    def is_divided(self) -> bool:
        return self._group is not None

    def exchange(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def together(self, mild: type[MeritFastError]) -> Iterator[None]:
        """Raises an error of one process in all of them, so that none waits for another.

        Args:
            mild: class of errors that give way to others.

        Raises:
            MeritFastError: the process's own, or that of another with its rank.
        """
        own: MeritFastError | None = None
        try:
            yield
        except MeritFastError as error:
            own = error
        told = self.exchange(None if own is None else (isinstance(own, mild), str(own)))
        errors = [(rank, *found) for rank, found in enumerate(told) if found is not None]
        worst = [error for error in errors if not error[1]] or errors
        if own is not None and (not isinstance(own, mild) or worst[0][1]):
            raise own
        for rank, is_mild, message in worst:
            raise (mild if is_mild else MeritFastError)(f"process {rank}: {message}")


def _shard_group(parameter: nn.Parameter) -> Any:
    """The group among which a DTensor is divided; None for other parameters."""
    if not hasattr(parameter, "device_mesh"):
        return None
    sharded: Any = parameter
    for dim, placement in enumerate(sharded.placements):
        if not placement.is_replicate():
            return sharded.device_mesh.get_group(dim)
    return None
