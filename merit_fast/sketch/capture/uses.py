"""Uses of parameters that no module hook sees: found, or tapped where they are known calls."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from merit_fast.sketch.capture.coverage import (
    Cover,
    embedding_backward,
    first_input,
    linear_backward,
)
from merit_fast.sketch.capture.layout import Site
from merit_fast.sketch.capture.twins import own_parameters

_HARMLESS = {"to", "type_as", "detach", "requires_grad_"}
_HARMLESS |= {"zeros_like", "ones_like", "empty_like", "full_like"}
_HARMLESS |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}


class UseAudit(TorchFunctionMode):
    """Notes every torch function that gets a parameter, until a hook calls ``covered``.

    Such uses are a head called as F.linear(x, embedding.weight), or a fused loss that reads the
    head's weight.

    Attributes:
        stray: parameter's name -> the function that used it last and was not covered since.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.stray = dict[str, str]()

    def covered(self, names: Iterable[str]) -> None:
        for name in names:
            self.stray.pop(name, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        returns_tensor = any(isinstance(value, Tensor) for value in _flat((result,)))
        if func.__name__ not in _HARMLESS and returns_tensor:
            for value in _flat((*args, *kwargs.values())):
                if name := self.names.get(id(value)):
                    self.stray[name] = func.__name__
        return result


class RawUses(TorchFunctionMode):
    """Taps F.linear and F.embedding where a module calls them with its own parameters.

    Routers of experts do so.
    """

    def __init__(self, site: Site, tap: Callable[..., Tensor]) -> None:
        super().__init__()
        self.site = site
        self.tap = tap
        self.names = {
            id(p): site.owned[local]
            for local, p in own_parameters(site.module).items()
            if local in site.owned
        }
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in (F.linear, F.embedding) or len(args) < 2:
            return result
        x, weight, *rest = args
        bias = (rest[0] if rest else kwargs.get("bias")) if func is F.linear else None
        names = {"weight": self.names.get(id(weight)), "bias": self.names.get(id(bias))}
        owned = {local: name for local, name in names.items() if name is not None}
        if not owned:
            return result
        self.seen.update(owned.values())
        site = Site(self.site.module, owned, self.site.tower)
        if func is F.linear:
            return self.tap(Cover(site, first_input, linear_backward), result, [x])
        padding = rest[0] if rest else kwargs.get("padding_idx")
        backward = functools.partial(embedding_backward, padding_idx=padding)
        return self.tap(Cover(site, first_input, backward, lookup=True), result, [x])


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value
