"""Choice of the parameters to sketch, and the fingerprint of a model in memory."""

import hashlib
import re
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from merit_fast.errors import InputError, MeritFastError, show
from merit_fast.model.layered.stack import block_lists
from merit_fast.model.layered.stream import bring_in
from merit_fast.sketch.names import canonical_name, named_parameters

_PROBES = 64


def select_parameters(
    model: nn.Module,
    parameters: str = "all",
    trainable: Callable[[nn.Parameter], bool] | None = None,
) -> dict[str, nn.Parameter]:
    """The parameters to sketch, by name in the model's order; a tied one goes by its first name.

    Args:
        model: as given to ``sketch_gradients``; names are those of ``model.named_parameters()``,
            without what wrappers put into them (``canonical_name``).
        parameters: "all" that require a gradient; "blocks": those inside the transformer blocks;
            else a regular expression, searched for in the names. Parameters that require no
            gradient are never among them.
        trainable: whether a parameter counts as requiring a gradient; None: ``requires_grad``.

    Raises:
        InputError: ``parameters`` is no regular expression, or selects nothing.
    """
    wanted = _wanted(model, parameters)
    trainable = trainable or (lambda parameter: parameter.requires_grad)
    chosen = {name: p for name, p in named_parameters(model) if trainable(p) and wanted(name)}
    if not chosen:
        raise InputError(
            "parameters: must select at least one parameter that requires a gradient, "
            f"got {show(parameters)}"
        )
    return chosen


def require_whole(parameters: Mapping[str, nn.Parameter]) -> None:
    """Checks that this process has every parameter, and all of it.

    Raises:
        MeritFastError: one is a DTensor, as FSDP2 and tensor parallelism leave it, or is on the
            meta device, as accelerate's hooks leave what they offload.
    """
    for name, parameter in parameters.items():
        reason = ""
        if hasattr(parameter, "device_mesh"):
            reason = "is a DTensor (FSDP2, tensor parallelism), of which each process has a part"
        elif parameter.is_meta:
            reason = "has no values (meta device; offloaded by accelerate?)"
        if reason:
            raise MeritFastError(
                f"sketch_gradients: parameter {name} must be whole in this process, but {reason}; "
                "load_layered reads a model that does not fit layer by layer, and states of "
                "processes that sketch different examples add up (SketchState.merge)"
            )


def model_weights_fingerprint(model: nn.Module) -> str:
    """32 hex digits of a model in memory: names, shapes, dtypes and 64 values per parameter."""
    digest = hashlib.sha256()
    probes = []
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    for name, parameter in named_parameters(model):
        bring_in(owners[id(parameter)])
        digest.update(f"{name}\n{list(parameter.shape)}\n{parameter.dtype}\n".encode())
        flat = parameter.detach().reshape(-1)
        probes.append(flat[:: max(1, len(flat) // _PROBES)].float())
    for device in sorted({str(probe.device) for probe in probes}):
        values = torch.cat([probe for probe in probes if str(probe.device) == device]).cpu()
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel and torch.compile."""
    core = model.module if isinstance(model, DistributedDataParallel) else model
    inside: nn.Module = getattr(core, "_orig_mod", core)
    return inside


def require_one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises InputError if an option has none of its values."""
    if value not in allowed:
        listed = ", ".join(map(repr, allowed))
        raise InputError(f"{key}: must be one of {listed}, got {show(value)}")


def _wanted(model: nn.Module, parameters: str) -> Callable[[str], bool]:
    if parameters == "all":
        return lambda name: True
    if parameters == "blocks":
        blocks = tuple(f"{name}." for name in block_lists(model))
        blocks = tuple(canonical_name(block) for block in blocks)
        return lambda name: name.startswith(blocks)
    try:
        pattern = re.compile(parameters)
    except re.error as error:
        raise InputError(
            "parameters: must be 'all', 'blocks' or a regular expression, "
            f"got {show(parameters)} ({error})"
        ) from None
    return lambda name: pattern.search(name) is not None
