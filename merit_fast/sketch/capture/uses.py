"""Finds parameters that a model uses outside the forward of the module that owns them, where no hook sees it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_HARMLESS = {
    "to",
    "type_as",
    "detach",
    "requires_grad_",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
}
_HARMLESS |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}


class UseAudit(TorchFunctionMode):
    """Notes every torch function that gets a parameter, until the hook of the parameter's module calls ``covered``.

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
        if func.__name__ not in _HARMLESS and any(
            isinstance(value, Tensor) for value in _flat((result,))
        ):
            for value in _flat((*args, *kwargs.values())):
                if name := self.names.get(id(value)):
                    self.stray[name] = func.__name__
        return result


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value
