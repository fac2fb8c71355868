"""Residual sums and the norm after them in one pass, inside a decoder layer's own forward.

The forward runs on a view of the layer, as the model's forward does without logits. There the
result of an attention or MLP only takes part in sums: residual + result becomes a pending sum, and
a norm of a pending sum is ``add_rms_norm``. Anything else that the forward does with them computes
them first, as the layer would.
"""

import abc
import contextlib
import functools
import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from merit_fast.kernels.layers import add_rms_norm
from merit_fast.patch.classes import Forward, Plan, has_hooks, method_on_instance, supported
from merit_fast.patch.forms.norm import norm_in_use

_SUMS = frozenset({torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__})
_is_trial: list[bool] = []
_OPERATORS = (
    "__mul__", "__rmul__", "__sub__", "__rsub__", "__truediv__", "__rtruediv__", "__neg__",
    "__pow__", "__matmul__", "__rmatmul__", "__getitem__", "__setitem__", "__len__", "__iter__",
    "__iadd__", "__isub__", "__imul__", "__itruediv__", "__eq__", "__ne__", "__lt__", "__le__",
    "__gt__", "__ge__", "__bool__", "__float__", "__int__", "__contains__",
)  # fmt: skip


def plan_sums(plans: list[Plan], modules: list[nn.Module], backend: str | None) -> list[Plan]:
    """Plans the layers that hold a planned norm and other modules; a trial must follow."""
    planned = {plan.module for plan in plans}
    norms = {plan.module for plan in plans if plan.op == "rms_norm"}
    return [
        Plan(module, "add_rms_norm", layer_forward, (backend,))
        for module in modules
        if module not in planned and method_on_instance(module) is None and _may_add(module, norms)
    ]


def _may_add(module: nn.Module, norms: set[nn.Module]) -> bool:
    children = list(module.children())
    large = [child for child in children if next(child.children(), None) is not None]
    return any(child in norms for child in children) and len(large) > 1


def layer_forward(original: type[nn.Module], backend: str | None) -> Forward:
    """Makes a layer's forward: its own code on a view of it."""
    plain = original.forward

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # which sees and fuses the sums itself
            return plain(self, *args, **kwargs)
        return _computed(plain(_View(self, backend), *args, **kwargs))

    return forward


class _View:
    """A layer as its own forward sees it; what it sets is set on the layer."""

    forward = None  # transformers' checkpointing asks the class: the swapped class does it

    def __init__(self, layer: nn.Module, backend: str | None) -> None:
        self.__dict__.update(_layer=layer, _backend=backend)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._layer, name)
        if not isinstance(value, nn.Module) or name not in self._layer._modules:
            return value
        return _Child(value, self._backend)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._layer, name, _computed(value))


class _Child:
    """A child as the layer's forward sees it; its result may wait to be added to a residual."""

    def __init__(self, module: nn.Module, backend: str | None) -> None:
        self.__dict__.update(_module=module, _backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], _Sum):
            normed = args[0].normed_by(self._module, self._backend)
            if normed is not None:
                return normed
        output = self._module(*_computed(args), **_computed(kwargs))
        if type(output) is Tensor:
            return _Branch(output)
        if type(output) is tuple and output and type(output[0]) is Tensor:
            return (_Branch(output[0]), *output[1:])
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, _computed(value))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._module)  # for isinstance


@contextlib.contextmanager
def only_plain_forms() -> Iterator[None]:
    """Makes a TypeError of all that a layer does with its branches but to add and to normalise."""
    _is_trial.append(True)
    try:
        yield
    finally:
        _is_trial.pop()


def _refuse_in_trials(name: str) -> None:
    if _is_trial:
        raise TypeError(f"the layer calls {name} of a residual or of what it adds to it")


class _Pending(abc.ABC):
    """A tensor that a layer's forward holds before it needs its values."""

    @abc.abstractmethod
    def computed(self) -> Tensor:
        """The tensor's values."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _SUMS and len(args) == 2 and not kwargs:
            return _added(*args)
        _refuse_in_trials(getattr(function, "__name__", ""))
        return function(*_computed(args), **_computed(kwargs or {}))

    def __add__(self, other: Any) -> Any:
        return _added(self, other)

    def __radd__(self, other: Any) -> Any:
        return _added(other, self)

    def __getattr__(self, name: str) -> Any:
        _refuse_in_trials(name)
        return getattr(self.computed(), name)


def _forwarded(name: str) -> Any:
    def forwarded(self: _Pending, *args: Any) -> Any:
        _refuse_in_trials(name)
        return getattr(self.computed(), name)(*_computed(args))

    return forwarded


for _name in _OPERATORS:
    setattr(_Pending, _name, _forwarded(_name))


class _Branch(_Pending):
    """The result of a layer's child."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def computed(self) -> Tensor:
        return self.value


class _Sum(_Pending):
    """residual + the result of a child; a norm of it computes it on the way."""

    def __init__(self, residual: Tensor, value: Tensor) -> None:
        self.terms: tuple[Tensor, Tensor] | None = (residual, value)
        self.total: Tensor | None = None

    def computed(self) -> Tensor:
        if self.terms is not None:
            self._set_total(self.terms[0] + self.terms[1])
        return cast(Tensor, self.total)

    def _set_total(self, total: Tensor) -> None:
        self.total = total
        self.terms = None  # whose memory the layer would have given back

    def normed_by(self, norm: nn.Module, backend: str | None) -> Tensor | None:
        """The norm of the sum in one pass; None if the norm must run by itself."""
        arguments = norm_in_use(norm)
        if arguments is None or self.terms is None or has_hooks(norm):
            return None
        weight, options = arguments
        if not supported(*self.terms, *(() if weight is None else (weight,))):
            return None
        residual, value = self.terms
        out, total = add_rms_norm(value, residual, weight, **options, backend=backend)
        self._set_total(total)
        return out


def _added(first: Any, second: Any) -> Any:
    """first + second; pending if one is the result of a child and the other is a residual."""
    residual, branch = (second, first) if isinstance(first, _Branch) else (first, second)
    residual = _computed(residual)
    fits = (
        isinstance(branch, _Branch)
        and type(residual) is Tensor
        and residual.shape == branch.value.shape
        and residual.dtype == branch.value.dtype
        and residual.device == branch.value.device
    )
    if fits:
        return _Sum(residual, branch.value)
    return _computed(first) + _computed(second)


def _computed(value: Any) -> Any:
    """Values that a forward holds, with tensors in place of what is pending."""
    if isinstance(value, _Pending):
        return value.computed()
    if type(value) in (tuple, list):
        computed = [_computed(item) for item in value]
        return value if all(map(operator.is_, computed, value)) else type(value)(computed)
    if isinstance(value, dict):
        for key, item in list(value.items()):
            computed = _computed(item)
            if computed is not item:
                value[key] = computed
    return value
