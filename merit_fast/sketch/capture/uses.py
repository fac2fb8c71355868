"""Uses of parameters that no module's formula knows: found, or tapped in known calls."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_HARMLESS = {"detach", "requires_grad_", "view_as"}
_HARMLESS |= {"zeros_like", "ones_like", "empty_like", "full_like"}
_HARMLESS |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
# Harmless where they return their argument.
_SAME = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous"}

# (function, result, arguments as F.linear or F.embedding name them) -> the result, tapped
TapUse = Callable[[Any, Tensor, dict[str, Any]], Tensor]


class UseAudit(TorchFunctionMode):
    """Notes every torch function that gets a parameter outside the module that is known to use it.

    Such uses are a head called as F.linear(x, embedding.weight), a fused loss that reads the head's
    weight, or a weight that is computed from other parameters before its module runs.

    Attributes:
        covered: parameters' names -> how many modules that run now are known to use them.
        stray: parameter's name -> a function that used it elsewhere.
    """

    def __init__(self, names: Mapping[int, str], covered: Mapping[str, int]) -> None:
        super().__init__()
        self.names = names
        self.covered = covered
        self.stray = dict[str, str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for value in used_values(func, result, args, kwargs):
            name = self.names.get(id(value))
            if name is not None and not self.covered.get(name):
                self.stray[name] = func.__name__
        return result


class RawUses(TorchFunctionMode):
    """Taps known functions where they get a module's own parameters; notes other uses.

    Routers of experts call F.linear so, and mixers F.conv1d with the weight of a convolution.

    Attributes:
        owned: id of every such parameter, or of a view of it -> its local name.
        is_covered: whether a module that runs now is known to use the parameter.
        tap_use: called with each such use; to be set.
        other: local names of parameters that another function got.
    """

    tap_use: TapUse

    def __init__(self, owned: Mapping[int, str], is_covered: Callable[[str], bool]) -> None:
        super().__init__()
        self.owned = dict(owned)
        self.is_covered = is_covered
        self.other: set[str] = set()
        self._views: list[Tensor] = []  # kept, for ids are used again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [self.owned[id(v)] for v in _flat((*args, *kwargs.values())) if id(v) in self.owned]
        if not given or any(self.is_covered(local) for local in given):
            return result
        if func.__name__ in _VIEWS and isinstance(result, Tensor):
            self.owned[id(result)] = given[0]
            self._views.append(result)
            return result
        known = known_arguments(func, args, kwargs)
        if known is not None and any(id(known.get(key)) in self.owned for key in _TAPPED):
            return self.tap_use(func, result, known)
        for value in used_values(func, result, args, kwargs):
            if id(value) in self.owned:
                self.other.add(self.owned[id(value)])
        return result


_VIEWS = {"squeeze", "unsqueeze"}
_TAPPED = ("weight", "bias")
_ARGUMENTS = {
    F.linear: ("input", "weight", "bias"),
    F.embedding: (
        "input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse",
    ),
    F.conv1d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
}  # fmt: skip
_WHOLE_BATCH = ("max_norm", "scale_grad_by_freq")


def known_arguments(func: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments by name of a call whose gradient is known; None for any other call."""
    if func not in _ARGUMENTS:
        return None
    given = dict(zip(_ARGUMENTS[func], args, strict=False)) | dict(kwargs)
    if func is F.conv1d:
        channels, each, _ = given["weight"].shape
        is_depthwise = each == 1 and given.get("groups", 1) == channels
        return given if is_depthwise and not isinstance(given.get("padding"), str) else None
    return None if any(given.get(key) for key in _WHOLE_BATCH) else given


def used_values(func: Any, result: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Arguments on whose values the result of a torch function depends."""
    if func.__name__ in _HARMLESS:
        return
    # On the meta device there are no values; accelerate leaves such tensors behind.
    if not any(isinstance(value, Tensor) and not value.is_meta for value in _flat((result,))):
        return
    for value in _flat((*args, *kwargs.values())):
        if not (func.__name__ in _SAME and value is result):
            yield value


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value
