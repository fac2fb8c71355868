"""Sums of the states of several processes."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from merit_fast.errors import MeritFastError
from merit_fast.manifests.sketch_state import SketchState

_ALONE = (
    "sketch_gradients: sum_over_processes needs a process group, and torch.distributed has none"
)


def summed_states(states: Mapping[Any, SketchState], group: Any = None) -> dict[Any, SketchState]:
    """Adds the states of all processes, dataset by dataset, in the order of their ranks.

    Every process gets the same bits. Datasets are in the order in which the first ranks have them;
    memory holds one dataset's states of all processes.

    Raises:
        MeritFastError: there is no process group, or states differ in sketch, model or parameters.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise MeritFastError(_ALONE)
    names: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(names, list(states), group=group)
    summed: dict[Any, SketchState] = {}
    for name in dict.fromkeys(name for of_rank in names for name in of_rank):
        gathered: list[Any] = [None] * len(names)
        dist.all_gather_object(gathered, states.get(name), group=group)
        present = [state for state in gathered if state is not None]
        summed[name] = SketchState.zeros(present[0].identity, len(present[0].block_counts))
        for state in present:
            summed[name].merge(state)
    return summed
