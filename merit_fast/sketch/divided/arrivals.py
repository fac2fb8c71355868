"""Forms of parameters that come to their places while modules run."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from merit_fast.errors import MeritFastError
from merit_fast.sketch.divided.places import (
    Place,
    is_away,
    is_fsdp2,
    offloading_hook,
    places_of,
)
from merit_fast.sketch.divided.ties import lost_ties
from merit_fast.sketch.divided.wrapping import wrap_forward

# (name of a sketched parameter, its form) -> whether the form needs a gradient in this pass
Arrive = Callable[[str, nn.Parameter], bool]


def names_of_ids(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[int, str]:
    """Id of every parameter, also of a tied one that accelerate has made two -> its name."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    ties = lost_ties(model)
    for place in places_of(model):
        name = ties.get(place.name, place.name)
        if name in parameters and name != place.name:
            names[id(place.parameter)] = name
    return names


class Arrivals:
    """Follows the forms of parameters: FSDP2's gathered ones, accelerate's copies.

    Every form that comes is frozen, or unfrozen where the pass wants its gradient. Taps and the
    check know a parameter by the identity of any of its forms.

    Args:
        names: id of every sketched parameter -> its name; forms are added while they exist.
        arrive: called with each form of a sketched parameter.
    """

    def __init__(self, model: nn.Module, names: dict[int, str], arrive: Arrive) -> None:
        self.names = names
        self.arrive = arrive
        self._homes = {place: place.parameter for place in places_of(model)}
        self._sketched = {
            place: names[id(home)] for place, home in self._homes.items() if id(home) in names
        }
        self._gathering = [module for module in model.modules() if is_fsdp2(module)]
        self._offloaded = [module for module in model.modules() if offloading_hook(module)]
        self._forms: dict[int, nn.Parameter] = {}  # kept, for ids are used again

    @property
    def is_needed(self) -> bool:
        """Whether parameters come and go in this model."""
        return bool(self._gathering or self._offloaded)

    def attach(self) -> list[Callable[[], object]]:
        """Begins to follow; returns what undoes that. To be called when modules have taps."""
        undo: list[Callable[[], object]] = [self._forms.clear]
        for module in self._gathering:
            inside = set(module.modules())
            places = [place for place in self._homes if place.module in inside]
            hook = functools.partial(self._gathered, places)
            undo.append(module.register_forward_pre_hook(hook).remove)
        for module in self._offloaded:
            places = [place for place in self._homes if place.module is module]
            undo.append(wrap_forward(module, functools.partial(self._around, places)))
        return undo

    def unfreeze(self) -> None:
        """Lets ``arrive`` have the forms that are there when a pass begins."""
        self._register(self._sketched if self.is_needed else ())

    def forget(self) -> None:
        """Forgets the forms, when a pass has ended."""
        for key in self._forms:
            self.names.pop(key, None)
        self._forms.clear()

    def require_here(self, module: nn.Module, owned: Mapping[str, str]) -> None:
        """Checks that a module that runs has all values of its parameters.

        Args:
            owned: local name of each -> its name in the model.

        Raises:
            MeritFastError: nothing brought them.
        """
        for local, name in owned.items() if self.is_needed else ():
            child, _, key = local.rpartition(".")
            parameter = module.get_submodule(child)._parameters[key]
            if parameter is not None and is_away(parameter):
                raise MeritFastError(
                    f"sketch_gradients: parameter {name} of {type(module).__name__} must be whole "
                    "while its module runs, but this process has a part of it or no values; call "
                    "the module that fully_shard or accelerate got, not one inside of it"
                )

    def _register(self, places: Iterable[Place]) -> list[int]:
        """Registers the forms that are at some places; returns their ids."""
        found = []
        for place in places:
            form = place.parameter
            if is_away(form):  # a module inside brings it
                continue
            name = self._sketched.get(place)
            if name is None:
                form.requires_grad_(False)
                continue
            self.names[id(form)] = name
            if form is not self._homes[place]:
                self._forms[id(form)] = form
                found.append(id(form))
            form.requires_grad_(self.arrive(name, form))
        return found

    def _gathered(self, places: list[Place], module: nn.Module, args: Any) -> None:
        """Runs after FSDP2's own hook, which has gathered the group's parameters.

        FSDP2 copies ``requires_grad`` from its shards at every gathering.
        """
        for place in places:
            name = self._sketched.get(place)
            home = self._homes[place]
            home.requires_grad_(name is not None and self.arrive(name, home))
        self._register(places)

    def _around(
        self, places: list[Place], original: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        found = self._register(places)
        try:
            return original(*args, **kw)
        finally:
            for key in found:
                if not self._forms[key].requires_grad:
                    del self._forms[key]
                    self.names.pop(key, None)
