"""Models that are divided in a way in which no process can sketch them."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from merit_fast.errors import MeritFastError
from merit_fast.sketch.divided.places import is_fsdp1, is_fsdp2, offloading_hook, places_of
from merit_fast.sketch.divided.ties import lost_ties, require_known_ties
from merit_fast.sketch.divided.wrapping import own_forward

_ADVICE = (
    "; load_layered reads a model that does not fit layer by layer, and states of processes that "
    "sketch different examples add up (SketchState.merge)"
)


def require_known(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Checks that every parameter is whole in this process, at least while its module runs.

    Raises:
        MeritFastError: one is divided by tensor parallelism, FSDP1 or DeepSpeed's ZeRO-3, or has no
            values and no hook of accelerate's that brings them.
    """
    require_known_ties(model, lost_ties(model))
    gathered = set(_gathered_by_fsdp2(model))
    brought = {id(place.parameter) for place in places_of(model) if offloading_hook(place.module)}
    flat = {
        id(parameter)
        for module in model.modules()
        if is_fsdp1(module)
        for parameter in module.parameters()
    }
    sliced = {id(place.parameter): place.module for place in places_of(model)}
    for name, parameter in parameters.items():
        reason = ""
        if hasattr(parameter, "device_mesh"):
            if _num_shards(parameter) > 1:
                reason = "is divided by FSDP2 over tensor parallelism"
            elif id(parameter) not in gathered:
                reason = _tensor_parallel(parameter, sliced)
        elif parameter.is_meta and id(parameter) not in brought:
            reason = "has no values (meta device), and no hook of accelerate's module brings them"
        elif id(parameter) in flat:
            reason = "is flattened by FullyShardedDataParallel (FSDP1); use fully_shard"
        elif hasattr(parameter, "ds_id"):
            reason = "is divided by DeepSpeed's ZeRO-3"
        if reason:
            raise MeritFastError(
                f"sketch_gradients: parameter {name} must be whole in this process while its "
                f"module runs, but {reason}{_ADVICE}"
            )


def _tensor_parallel(parameter: Any, owners: Mapping[int, nn.Module]) -> str:
    """Reason why a parameter of tensor parallelism cannot be sketched; "" if it can."""
    module = owners[id(parameter)]
    if parameter.device_mesh.ndim > 1:
        return "is a DTensor on a mesh of several dimensions"
    if own_forward(module) not in (nn.Linear.forward, nn.Embedding.forward):
        kind = type(module).__name__
        return f"is a DTensor of {kind}: tensor parallelism of Linear and Embedding is sketched"
    return ""


def _gathered_by_fsdp2(model: nn.Module) -> Iterator[int]:
    for module in model.modules():
        if is_fsdp2(module):
            yield from (id(parameter) for parameter in module.parameters())


def _num_shards(parameter: nn.Parameter) -> int:
    """Number of the mesh's dimensions that divide a DTensor."""
    divided: Any = parameter
    return sum(not placement.is_replicate() for placement in divided.placements)
