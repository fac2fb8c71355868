"""Tied parameters of which accelerate's hooks have made several."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from merit_fast.errors import MeritFastError
from merit_fast.sketch.divided.places import Place, offloading_hook, places_of, present
from merit_fast.sketch.names import canonical_name

_PROBES = 64


def lost_ties(model: nn.Module) -> dict[str, str]:
    """Offloaded parameters that are another one too: name -> that of the first in the model.

    The hooks give each place a parameter of its own. The model's list of ties, as transformers
    keeps it, says which are one; their values are compared.
    """
    places = {place.name: place for place in places_of(model)}
    away = _offloaded(places)
    order = list(places)
    ties: dict[str, str] = {}
    for pair in _listed_ties(model).items() if away else ():
        names = [canonical_name(name) for name in pair]
        if not {*names} & away.keys() or not {*names} <= places.keys():
            continue
        first, second = sorted((ties.get(name, name) for name in names), key=order.index)
        if first != second and _probed(places[first]) == _probed(places[second]):
            ties[second] = first
    return ties


def require_known_ties(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Checks that no two offloaded matrices may be one parameter unknown to ``ties``.

    Raises:
        MeritFastError: two that are not constant have equal values, or tensor parallelism has made
            two of one.
    """
    _require_kept_ties(model)
    firsts: dict[tuple[Any, ...], str] = {}
    for name, place in _offloaded({place.name: place for place in places_of(model)}).items():
        key = _probed(place)
        if name in ties or key is None:
            continue
        if key in firsts:
            raise MeritFastError(
                f"sketch_gradients: offloaded parameters {firsts[key]} and {name} have equal "
                "values, and the model does not list whether they are one; load it into memory"
            )
        firsts[key] = name


def _require_kept_ties(model: nn.Module) -> None:
    places = {place.name: place for place in places_of(model)}
    for pair in _listed_ties(model).items():
        found = [places[name] for name in map(canonical_name, pair) if name in places]
        parameters = {id(place.parameter): place for place in found}
        if len(parameters) > 1 and any(hasattr(p.parameter, "device_mesh") for p in found):
            raise MeritFastError(
                f"sketch_gradients: parameters {found[0].name} and {found[1].name} are one in the "
                "model, but tensor parallelism has made two of it"
            )


def _offloaded(places: Mapping[str, Place]) -> dict[str, Place]:
    return {
        name: place
        for name, place in places.items()
        if place.parameter.is_meta and offloading_hook(place.module) is not None
    }


def _listed_ties(model: nn.Module) -> Mapping[str, str]:
    """Ties that a model of transformers lists: target -> source."""
    ties: Any = getattr(model, "all_tied_weights_keys", None)
    return ties if isinstance(ties, Mapping) else {}


def _probed(place: Place) -> tuple[Any, ...] | None:
    """Values that equal parameters share; None for vectors and constants, often equal by chance."""
    with present(place.module):
        values = place.parameter.detach()
        if values.dim() < 2:
            return None
        flat = values.reshape(-1)
        probes = flat[:: max(1, len(flat) // _PROBES)].float().cpu()
    if bool(torch.all(probes == probes[0])):
        return None
    return (tuple(values.shape), values.dtype, *probes.tolist())
