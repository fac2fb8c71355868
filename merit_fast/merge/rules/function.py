"""A user's own merge method: a function of all models' values of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any, TypeAlias

from merit_fast.errors import InputError, one_line
from merit_fast.kernels.lazy import np
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.rules.values import Coefficients
from merit_fast.records import record

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.float64]"
# function(deltas [K, n], weights [K], **parameters) -> [n]
MergeFunction = Callable[..., Any]


@record
class UserFunction:
    """The kind of registered methods: the engine calls ``function`` with whole tensors."""

    function: MergeFunction

    @property
    def source(self) -> str:
        """Digest of the function's code: outputs of another version are not taken for finished."""
        import hashlib
        import inspect

        function = inspect.unwrap(self.function)
        try:
            text = inspect.getsource(function)
        except (OSError, TypeError):
            text = _code_text(function)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _code_text(function: Any) -> str:
    """Text that stands for a function whose source file is not there."""
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{type(function).__module__}:{type(function).__qualname__}"
    constants = [item for item in code.co_consts if not isinstance(item, CodeType)]
    return repr((function.__qualname__, code.co_code, code.co_names, constants))


@record
class FunctionRule:
    """A user's function with one tensor's weights and parameters.

    with a base:  theta_0 + scale * function(deltas, weights, **parameters)
    without:      function(models, weights, **parameters)
    """

    method: str
    function: MergeFunction
    weights: Coefficients
    parameters: tuple[tuple[str, float], ...]
    has_base: bool
    scale: float = 1.0

    def combine(self, name: str, inputs: Sequence[Array], allow_nonfinite: bool) -> Array:
        """[n] the merged tensor in float64, before it is rounded.

        Args:
            name: the tensor's name, for errors.
            inputs: [n] the values of each model, then of the base where the method has one.
            allow_nonfinite: let NaN and infinities of the function pass.

        Raises:
            InputError: the function failed, or returned another shape or numbers that are not
                finite.
        """
        values = np.stack(inputs[: len(self.weights)])
        if self.has_base:
            values -= inputs[-1]
        result = self._call(name, values)
        if not allow_nonfinite and not np.isfinite(result).all():
            rule = self._error(name, "must return finite numbers, got NaN or infinity")
            raise OptionError(str(rule), "allow_nonfinite", "{} writes them", "True")
        with np.errstate(over="ignore", invalid="ignore"):
            return inputs[-1] + self.scale * result if self.has_base else result

    def _call(self, name: str, values: Array) -> Array:
        count = values.shape[1]
        try:
            returned = self.function(values, np.array(self.weights), **dict(self.parameters))
            result = np.asarray(returned)
        except Exception as error:
            raise self._error(name, f"failed: {type(error).__name__}: {one_line(error)}") from error
        if result.shape != (count,):
            raise self._error(name, f"must return shape [{count}], got {list(result.shape)}")
        if result.dtype.kind not in "fiu":
            raise self._error(name, f"must return real numbers, got {result.dtype}")
        return result.astype(np.float64)

    def _error(self, name: str, rule: str) -> InputError:
        return InputError(f"merge: {name}: method {self.method}: {rule}")
