"""Places of a model's parameters, and the kinds of models that bring values to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from merit_fast.model.layered.stream import bring_in
from merit_fast.sketch.names import canonical_name


@dataclass(frozen=True)
class Place:
    """An entry of a module's parameters.

    Attributes:
        local: name in the module, such as "weight".
        name: canonical name in the model.
    """

    module: nn.Module
    local: str
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that is there now."""
        parameter = self.module._parameters[self.local]
        assert parameter is not None
        return parameter


def places_of(model: nn.Module) -> list[Place]:
    """All places, in the model's order; a tied parameter has several."""
    return [
        Place(module, local, canonical_name(f"{path}.{local}" if path else local))
        for path, module in model.named_modules()
        for local, parameter in module._parameters.items()
        if parameter is not None
    ]


def is_away(parameter: nn.Parameter) -> bool:
    """Whether this process lacks values of it: a DTensor, or on the meta device."""
    return hasattr(parameter, "device_mesh") or parameter.is_meta


def is_fsdp2(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on the module."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def is_around_fsdp2(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module inside of it."""
    return any(is_fsdp2(child) for child in module.modules() if child is not module)


def is_fsdp1(module: nn.Module) -> bool:
    """Whether the module is a ``FullyShardedDataParallel``."""
    return any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__)


def offloading_hook(module: nn.Module) -> Any:
    """The hook of accelerate that brings a module's own parameters; None without one."""
    hook = getattr(module, "_hf_hook", None)
    parts = getattr(hook, "hooks", (hook,))
    return hook if any(getattr(part, "offload", False) for part in parts) else None


def device_of(module: nn.Module, parameter: nn.Parameter) -> torch.device:
    """The device on which the module runs with a parameter."""
    if not parameter.is_meta:
        return parameter.device
    hook = offloading_hook(module)
    parts = getattr(hook, "hooks", (hook,))
    devices = [getattr(part, "execution_device", None) for part in parts]
    return torch.device(next((device for device in devices if device is not None), "cpu"))


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Lets a module have all values of its own parameters.

    Every process must enter for a divided module, at the same time.
    """
    bring_in(module)
    own = {local: value for local, value in module._parameters.items() if value is not None}
    hook = offloading_hook(module)
    if hook is not None and any(value.is_meta for value in own.values()):
        hook.pre_forward(module)
        try:
            yield
        finally:
            hook.post_forward(module, None)
            module._parameters.update(own)  # not the new empty ones
        return
    divided: dict[str, Any] = {k: v for k, v in own.items() if hasattr(v, "full_tensor")}
    for local, value in divided.items():
        module._parameters[local] = nn.Parameter(value.detach().full_tensor(), False)
    try:
        yield
    finally:
        module._parameters.update(divided)
