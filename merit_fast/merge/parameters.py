"""Parameters of merge methods. A value may differ by a tensor's name and along the layers."""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from merit_fast.options.fields import option, require
from merit_fast.records import record

Gradient = tuple[float, ...]


@record
class Case:
    """One line of a list of cases: ``value`` holds where a name contains ``filter``.

    A filter of None or "*" matches every name. ``slice`` restricts the case to one slice of a stack
    (merge/read/slices.py), counted from 0.
    """

    value: float | Gradient
    filter: str | None = None
    slice: int | None = None


# A number; a gradient over the layers; or cases: the first that matches a name counts.
Setting = float | Gradient | tuple[Case, ...]


@record
class Parameter:
    """A number that a method takes, with its range. ``default`` None: it must be given.

    ``by_model``: every model may have a number of its own.
    """

    name: str
    default: float | None
    help: str
    least: float = float("-inf")
    most: float = float("inf")
    by_model: bool = False

    def check(self, key: str, setting: Any) -> None:
        """Raises InputError if a number of ``setting`` lies outside the range; ``key`` names it."""
        if isinstance(setting, tuple):
            require(len(setting) > 0, key, "a number or a list of at least one", list(setting))
        for number in numbers_of(setting):
            require(self._allows(number), key, self.range_text, number)

    def _allows(self, number: float) -> bool:
        return abs(number) < float("inf") and self.least <= number <= self.most

    @property
    def range_text(self) -> str:
        """Range in words, as errors name it."""
        has_least = self.least > float("-inf")
        has_most = self.most < float("inf")
        if has_least and has_most:
            return f"between {self.least:g} and {self.most:g}"
        if has_least:
            return f"at least {self.least:g}"
        return f"at most {self.most:g}" if has_most else "a finite number"


WEIGHT = Parameter("weight", None, "weight of one model")
SCALE = Parameter("scale", 1.0, "factor on the step from the base")
DENSITY = Parameter("density", None, "share of every delta that is kept", 0.0, 1.0, True)
GAMMA = Parameter(
    "gamma", 0.01, "share of every delta's largest entries that is dropped", 0.0, 1.0, True
)
EPSILON = Parameter(
    "epsilon",
    0.15,
    "della: keep probability, from density - epsilon (smallest entry of a row) to "
    "density + epsilon (largest)",
    0.0,
    1.0,
    True,
)
SELECT_TOPK = Parameter(
    "select_topk",
    1.0,
    "sce: share of the varying elements that is kept, largest variance",
    0.0,
    1.0,
)
T = Parameter(
    "t", 0.5, "slerp: position on the arc from the first model (0) to the second (1)", 0.0, 1.0
)
# Numbers that several methods share; the options of a merge have a field for each name.
BUILT_IN = (SCALE, DENSITY, GAMMA, EPSILON, SELECT_TOPK, T)
BUILT_IN_NAMES = tuple(parameter.name for parameter in BUILT_IN)
# Numbers of single methods. Those with a shared name have a range and default of their own.
NEAR_T = Parameter(
    "t", None, "nearswap: largest step from the base towards the model, such as 0.001", 0.0
)
ACTIVE_EPSILON = Parameter("epsilon", 1e-5, "ram: a delta counts where it is larger", 0.0)
RAM_R = Parameter("r", 0.1, "ramplus_tl: strength of the boost", 0.0)
RAM_ALPHA = Parameter("alpha", 0.2, "ramplus_tl: most of shared over unique elements", 0.0)
MAX_ITER = Parameter("max_iter", 10.0, "karcher: most steps", 0.0)
TOL = Parameter("tol", 1e-5, "karcher: length of a step that ends the search", 0.0)
EPS = Parameter("eps", 1e-8, "multislerp: length below which a vector counts as 0", 0.0)


@record
class ModelSettings:
    """Parameters of one model. None: the value that holds for all models."""

    weight: Setting | None = option(None, "weight of this model")
    density: Setting | None = option(None, "share of this model's delta that is kept")
    gamma: Setting | None = option(
        None, "share of this model's largest delta entries that is dropped"
    )
    epsilon: Setting | None = option(None, "half the spread of this model's keep probabilities")


class Layers:
    """Layers of a model, by the first number between dots in a name (``model.layers.7.mlp``)."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = names

    @cached_property
    def count(self) -> int:
        """The number of layers, which only gradients over them need."""
        numbers = [number for name in self._names if (number := layer_of(name)) is not None]
        return max(numbers, default=-1) + 1

    def position(self, name: str) -> float:
        """Position of a tensor: 0 at the first layer and outside layers, 1 at the last one."""
        number = layer_of(name)
        if number is None:
            return 0.0
        return number / (self.count - 1) if self.count > 1 else 1.0

    def slice_of(self, name: str) -> int:
        """Number of the output's slice that holds the tensor; only stacked layers have several."""
        return 0

    def name_in(self, model: int, name: str) -> str:
        """Name of the output's tensor in one model; its layer differs where layers are stacked."""
        return name


def setting_at(
    setting: Setting | None, name: str, layers: Layers, model: int | None = None
) -> float | None:
    """The setting's value for one tensor; None where no case matches.

    Filters look at the name that ``model`` has for the tensor, else at the output's name. A
    gradient v[0..m-1] is linear between its points: at position t of the layer, p = t (m - 1).
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
    position = layers.position(name) * (len(gradient) - 1)
    below = int(position)
    above = min(below + 1, len(gradient) - 1)
    return (1.0 - (position - below)) * gradient[below] + (position - below) * gradient[above]


def numbers_of(setting: Setting | None) -> list[float]:
    """All numbers in a setting, for checks of its range."""
    if setting is None:
        return []
    if isinstance(setting, (int, float)):
        return [float(setting)]
    return [
        number
        for item in setting
        for number in (numbers_of(item.value) if isinstance(item, Case) else [float(item)])
    ]


def layer_of(name: str) -> int | None:
    """The number of the layer a tensor belongs to."""
    match = re.search(r"\.(\d{1,9})\.", name)
    return int(match.group(1)) if match else None
