"""Rows of tensors that are divided among processes, and how the leader gets them one by one."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from merit_fast.train.parallel.ranks import Ranks

PIECE_BYTES = 64 << 20  # of a tensor on its way to the leader


def is_divided(tensor: Tensor) -> bool:
    """Whether each process holds some rows of the tensor."""
    return isinstance(tensor, DTensor)


def own_part(tensor: Any) -> Tensor:
    """The rows of this process, which share the tensor's memory; a plain tensor itself."""
    if not is_divided(tensor):
        return tensor  # type: ignore[no-any-return]
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


def rows_of(num_rows: int, rank: int, size: int) -> tuple[int, int]:
    """First row and number of rows of one process, as FSDP2 deals them: even but for the last."""
    each = -(-num_rows // size)
    first = min(rank * each, num_rows)
    return first, min(each, num_rows - first)


def own_run(tensor: Tensor, start: int, count: int, rank: int, size: int) -> tuple[int, int]:
    """First element and number of elements of a run that lie in one process's rows.

    Args:
        tensor: a divided tensor of at least one dimension.
        start: the run's first element in row-major order.
        count: its number of elements.
        rank: the process.
        size: number of processes.
    """
    width = tensor.shape[1:].numel()
    first_row, num_rows = rows_of(tensor.shape[0], rank, size)
    first = max(start, first_row * width)
    last = min(start + count, (first_row + num_rows) * width)
    return first, max(0, last - first)


def stream_bytes(
    tensor: Tensor, ranks: Ranks, run: tuple[int, int] | None = None
) -> Iterator[memoryview]:
    """The elements of a whole tensor in row-major order, piece by piece, in the leading process.

    Every process calls it for a divided tensor and consumes it; the others get no piece. Only one
    piece of another process is in the leader's memory at once.

    Args:
        tensor: the tensor.
        ranks: the processes.
        run: first element and number of elements of a part of it; None: all.
    """
    own = own_values(tensor, ranks, run)
    if ranks.leads:
        for piece in _pieces(_as_bytes(own)):
            yield _view(piece)
    if not is_divided(tensor):
        return
    if not ranks.leads:
        for piece in _pieces(_as_bytes(own)):
            dist.send(piece, dst=0)
        return
    first, count = run or (0, tensor.numel())
    for rank in range(1, ranks.size):
        left = own_run(tensor, first, count, rank, ranks.size)[1] * tensor.element_size()
        while left:
            piece = torch.empty(min(left, PIECE_BYTES), dtype=torch.uint8, device=own.device)
            dist.recv(piece, src=rank)
            yield _view(piece)
            left -= piece.numel()


def own_values(tensor: Tensor, ranks: Ranks, run: tuple[int, int] | None = None) -> Tensor:
    """This process's elements of a run, flat, in the tensor's memory; None: of all."""
    own = own_part(tensor.detach())
    if run is None:
        return own.contiguous().view(-1)
    flat = own.view(-1)  # no copy: values may be written into it
    start, count = run
    if not is_divided(tensor):
        return flat[start : start + count]
    first, num_own = own_run(tensor, start, count, ranks.rank, ranks.size)
    offset = rows_of(tensor.shape[0], ranks.rank, ranks.size)[0] * tensor.shape[1:].numel()
    return flat[first - offset : first - offset + num_own]


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _pieces(data: Tensor) -> tuple[Tensor, ...]:
    return torch.split(data, PIECE_BYTES) if data.numel() else ()


def _view(piece: Tensor) -> memoryview:
    return piece.cpu().numpy().data
