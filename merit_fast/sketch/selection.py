"""Choice of the parameters to sketch, and the fingerprint of a model in memory."""

import hashlib
import re
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from merit_fast.errors import InputError, show
from merit_fast.model.layered.stack import block_lists
from merit_fast.sketch.divided.places import Place, places_of, present
from merit_fast.sketch.divided.ties import lost_ties
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
    ties = lost_ties(model)
    chosen = {
        name: parameter
        for name, parameter in named_parameters(model)
        if trainable(parameter) and wanted(name) and name not in ties
    }
    if not chosen:
        raise InputError(
            "parameters: must select at least one parameter that requires a gradient, "
            f"got {show(parameters)}"
        )
    return chosen


def model_weights_fingerprint(model: nn.Module) -> str:
    """32 hex digits of a model in memory: names, shapes, dtypes and 64 values per parameter.

    A divided or offloaded model has those of the whole one; every process must take it then.
    """
    digest = hashlib.sha256()
    probes = []
    ties = lost_ties(model)
    places: dict[int, Place] = {}
    for place in places_of(model):
        places.setdefault(id(place.parameter), place)
    for place in [place for place in places.values() if place.name not in ties]:
        with present(place.module):
            value = place.parameter.detach()
            digest.update(f"{place.name}\n{list(value.shape)}\n{value.dtype}\n".encode())
            flat = value.reshape(-1)
            probes.append(flat[:: max(1, len(flat) // _PROBES)].float().clone())
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
