"""Data parallelism inside a branch: each process takes a part of a step's micro-batches.

The gradient of a step is the sum over the processes, so that the losses are those of one process to
rounding; every process takes the same optimizer step.
"""

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from merit_fast.errors import InputError, one_line
from merit_fast.train.parallel.world import world_rank, world_size

T = TypeVar("T")

# losses and counts are on the CPU, gradients where the model is; nccl adds no CPU tensors
ON_GPU = "cpu:gloo,cuda:nccl"
# the others wait while the leader writes a branch, or while another machine trains one
PATIENCE = datetime.timedelta(days=7)


class Ranks:
    """The processes that train a branch together. The first one leads: it writes all files."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a sequence that all processes have."""
        return items[self.rank :: self.size]

    def add(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over the processes: the same bits everywhere."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def wait(self) -> None:
        """Waits until every process is here."""
        if self.size > 1:
            dist.barrier()

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replaces gradients by their sums; one that no process has stays None."""
        if self.size == 1 or not parameters:
            return
        device = parameters[0].device
        has_gradient = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        counts = has_gradient.to(device)
        dist.all_reduce(counts)
        for parameter, count in zip(parameters, counts.tolist(), strict=True):
            if not count:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def tell(self, message: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Gives the leader's message to every process; the others wait for it."""
        if self.size == 1:
            return message
        box: list[Any] = [message]
        dist.broadcast_object_list(box, src=0)
        received: tuple[str, ...] | None = box[0]
        return received


ONE_PROCESS = Ranks()


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Joins the processes that a launcher started: gloo for CPU tensors, nccl for those on GPUs.

    Raises:
        InputError: they cannot find each other.
    """
    size = world_size()
    if size == 1:
        yield Ranks()
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(world_rank() % torch.cuda.device_count())
    try:
        dist.init_process_group(ON_GPU if on_gpu else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"train: WORLD_SIZE is {size}: {one_line(error)}") from None
    try:
        yield Ranks(world_rank(), size)
    finally:
        dist.destroy_process_group()
