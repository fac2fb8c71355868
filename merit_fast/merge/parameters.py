"""Parameters that may differ from tensor to tensor: by a part of the name, and along the layers."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from merit_fast.options.fields import option

Gradient = tuple[float, ...]


@dataclass(frozen=True)
class Case:
    """One line of a list of cases: ``value`` holds where a name contains ``filter`` (None, "*": always).

    ``slice``: it holds in one slice of a stack only (merge/slices.py, from 0).
    """

    value: float | Gradient
    filter: str | None = None
    slice: int | None = None


# One number; a gradient over the layers; or cases, of which the first that matches a tensor's name counts.
Setting = float | Gradient | tuple[Case, ...]


@dataclass(frozen=True)
class ModelSettings:
    """What holds for one model only; None: what holds for all."""

    weight: Setting | None = option(None, "weight of this model")
    density: Setting | None = option(None, "share of this model's delta that is kept")
    gamma: Setting | None = option(
        None, "share of this model's largest delta entries that is dropped"
    )
    epsilon: Setting | None = option(None, "half the spread of this model's keep probabilities")


class Layers:
    """Which layer a tensor belongs to: the first number between dots in its name, as in ``model.layers.7.mlp``."""

    def __init__(self, names: Iterable[str]) -> None:
        numbers = [number for name in names if (number := layer_of(name)) is not None]
        self.count = max(numbers, default=-1) + 1

    def position(self, name: str) -> float:
        """0 at the first layer, 1 at the last or only one; 0 for what belongs to no layer."""
        number = layer_of(name)
        if number is None:
            return 0.0
        return number / (self.count - 1) if self.count > 1 else 1.0

    def slice_of(self, name: str) -> int:
        """The slice of the output the tensor is in; there is one alone unless layers are stacked."""
        return 0

    def name_in(self, model: int, name: str) -> str:
        """What one model calls the output's tensor: another layer's number where layers are stacked."""
        return name


def setting_at(
    setting: Setting | None, name: str, layers: Layers, model: int | None = None
) -> float | None:
    """The setting's value for one tensor; None where it says nothing about it.

    Filters look at the output's name, or at the one that ``model`` has for it.

    A gradient v[0..m-1] is linear between its points: at position t of the layer, p = t (m - 1).
    """
    if setting is None:
        return None
    if isinstance(setting, (int, float)):
        return float(setting)
    if setting and isinstance(setting[0], Case):
        cases: Sequence[Case] = setting  # type: ignore[assignment]
        for case in cases:
            shown = name if model is None else layers.name_in(model, name)
            named = case.filter is None or case.filter == "*" or case.filter in shown
            if named and case.slice in (None, layers.slice_of(name)):
                return setting_at(case.value, name, layers)
        return None
    gradient: Gradient = setting  # type: ignore[assignment]
    place = layers.position(name) * (len(gradient) - 1)
    below = int(place)
    above = min(below + 1, len(gradient) - 1)
    return (1.0 - (place - below)) * gradient[below] + (place - below) * gradient[above]


def numbers_of(setting: Setting | None) -> list[float]:
    """Every number a setting can give, for checks of its range. Between the points of a gradient it stays in theirs."""
    if setting is None:
        return []
    if isinstance(setting, (int, float)):
        return [float(setting)]
    return [
        n
        for part in setting
        for n in (numbers_of(part.value) if isinstance(part, Case) else [float(part)])
    ]


def layer_of(name: str) -> int | None:
    """The number of the layer a tensor belongs to."""
    found = re.search(r"\.(\d{1,9})\.", name)
    return int(found.group(1)) if found else None
