"""A head whose rows lie in several processes: what they tell each other."""

from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels import _splitmix
from merit_fast.kernels.cross_entropy._arguments import VocabularyShard

SMALLEST_EXPONENT = -800.0  # of a float64 power that is 0


def op_arguments(shard: VocabularyShard | None, weight: Tensor) -> tuple[list[int], str]:
    """First row here and rows in all processes, and the group's name, as ops take them."""
    if shard is None:
        return [0, weight.shape[0]], ""
    return [shard.first_row, shard.num_rows], shard.group.group_name


def _distributed(name: str) -> tuple[Any, Any]:
    """torch.distributed, which some builds of torch lack, and the group of a name."""
    import torch.distributed as dist

    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return dist, resolve(name)


def check_shares(op: str, vocabulary: list[int], weight: Tensor, labels: Tensor, name: str) -> None:
    """Raises ValueError in every process where the rows or the labels of the group do not fit."""
    if not name:
        return
    dist, group = _distributed(name)
    places = torch.arange(len(labels), device=labels.device)
    checksum = int(_splitmix.draw(labels, places).sum())
    facts = [vocabulary[0], len(weight), vocabulary[1], len(labels), checksum]
    own = torch.tensor(facts, device=weight.device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    shares = sorted(tuple(one.tolist()) for one in every)
    rows = [(first, first + count) for first, count, *_ in shares if count]
    last = 0
    for first, end in rows:
        if first != last:
            raise ValueError(f"{op}: rows of the processes must follow one another, got {rows}")
        last = end
    if any(total != last for _, _, total, *_ in shares):
        raise ValueError(f"{op}: num_rows must be the {last} rows of all, got {vocabulary[1]}")
    if len({one[3:] for one in shares}) > 1:
        raise ValueError(
            f"{op}: labels must be equal in every process of the vocabulary's group, "
            f"got {[one[3] for one in shares]} tokens of different labels"
        )


def combine_states(state: Tensor, name: str) -> None:
    """Replaces each process's state of the rows by that over all processes (``_native.update``)."""
    if not name or not state.shape[1]:
        return
    dist, group = _distributed(name)
    maxima = state[::5].clone()
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
    drop = (state[0] - maxima[0]).nan_to_num(nan=0.0, neginf=SMALLEST_EXPONENT)
    sums = state[1:5].clone()
    sums[0] *= drop.exp()
    if len(state) == 6:
        sums[3] = (state[4] + state[1] * drop) * drop.exp()
    dist.all_reduce(sums, group=group)
    state[::5] = maxima
    state[1:5] = sums


def add_over_processes(values: Tensor, name: str) -> None:
    """Replaces ``values`` by their sum over the processes."""
    if name and values.numel():
        dist, group = _distributed(name)
        dist.all_reduce(values, group=group)
