"""Freezes a model's weights for a time."""

import functools
from collections.abc import Callable, Collection

from torch import nn

from merit_fast.sketch.divided.places import Place, is_fsdp2, places_of

# Innermost last: parameters of sketchers that are at work still count as trainable.
_sketched: list[Collection[int]] = []


def is_trainable(parameter: nn.Parameter) -> bool:
    """Whether a parameter requires a gradient, or did before a sketcher froze it."""
    return parameter.requires_grad or any(id(parameter) in names for names in _sketched)


def freeze_weights(model: nn.Module, sketched: Collection[int]) -> list[Callable[[], object]]:
    """Freezes all weights; returns what undoes it, to be called from the last to the first.

    Args:
        sketched: ids of parameters that remain trainable for ``is_trainable``.
    """
    gathered = {id(p) for m in model.modules() if is_fsdp2(m) for p in m.parameters()}
    undo: list[Callable[[], object]] = []
    for place in places_of(model):
        parameter = place.parameter
        undo.append(functools.partial(_require, place, parameter.requires_grad))
        # FSDP2 looks for trainable ones in its first forward pass; ``Arrivals`` freezes them then.
        if id(parameter) not in gathered:
            parameter.requires_grad_(False)
    undo.append(functools.partial(reshard, model))
    _sketched.append(sketched)
    undo.append(functools.partial(_sketched.remove, sketched))
    return undo


def reshard(model: nn.Module) -> None:
    """Puts the shards of FSDP2 back to the places of gathered parameters."""
    for module in model.modules():
        if is_fsdp2(module):
            module.reshard()  # type: ignore[operator]


def _require(place: Place, requires_grad: bool) -> None:
    place.parameter.requires_grad_(requires_grad)
