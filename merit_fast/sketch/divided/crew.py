"""The processes that sketch a mixture together: each takes some of the passes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from merit_fast.errors import MeritFastError


class Crew:
    """Processes of one group, of which the first leads: it writes all files.

    Args:
        rank: of this process.
        size: number of processes; with more than one torch.distributed has their group.
        load: loads a model that is divided among them; None: each process loads its own.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, load: Callable[[], nn.Module] | None = None
    ) -> None:
        self.rank = rank
        self.size = size
        self.load = load

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def exchange(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises a MeritFastError of one process in all of them."""
        own: MeritFastError | None = None
        try:
            yield
        except MeritFastError as error:
            own = error
        errors = self.exchange(None if own is None else str(own))
        if own is not None:
            raise own
        if found := next((error for error in errors if error is not None), None):
            raise MeritFastError(found)


ONE_PROCESS = Crew()
