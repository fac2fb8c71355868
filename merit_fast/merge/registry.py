"""Merge methods by name: the built-in table, registered methods, and those of installed packages.

A package offers a method by an entry point of the group ``merit_fast.merge_methods``. The entry
point has the method's name and leads to a module that calls ``register_method`` with that name. It
is loaded only when the name is asked for.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from merit_fast.errors import InputError, one_line
from merit_fast.merge.method import MergeMethod
from merit_fast.merge.parameters import BUILT_IN, SCALE, Parameter
from merit_fast.merge.rules.function import MergeFunction, UserFunction
from merit_fast.merge.table import METHODS

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "merit_fast.merge_methods"
# Names that a function's parameters cannot have: its first arguments, and options of every merge.
_TAKEN = ("deltas", "weights", "seed", *(parameter.name for parameter in BUILT_IN))
_registered: dict[str, MergeMethod] = {}


def register_method(
    name: str,
    function: MergeFunction,
    *,
    needs_base: bool = True,
    parameters: Sequence[Parameter] = (),
    takes_weights: bool = True,
    fewest_models: int = 1,
    most_models: int | None = None,
) -> None:
    """Makes a function a merge method that every entrance knows by ``name``.

        def median(deltas, weights):
            return np.median(deltas, axis=0)

        register_method("median", median)

    The function sees one float tensor at a time, whole and flattened, in row-major order:
    ``function(deltas, weights, **parameters) -> [n]`` with ``deltas`` [K, n] and ``weights`` [K] in
    float64. With a base the result is theta_0 + scale * function(...), and ``deltas`` are the
    models' differences from the base; without one the rows are the models themselves. The result is
    rounded once. The function must depend on its arguments only; NumPy runs it, one tensor at a
    time.

    Args:
        name: the value of ``method``: lower-case letters, digits and underscores.
        function: see above.
        needs_base: whether the method starts from a base. It then takes ``scale`` too.
        parameters: numbers that it takes as keywords, with defaults and ranges. Users give them as
            ``parameters: {NAME: VALUE}``, each a number, a gradient over the layers, or cases.
        takes_weights: whether models may be weighed; if not, ``weights`` are all equal.
        fewest_models: least number of models that it takes.
        most_models: greatest number of models; None: any.

    Raises:
        InputError: the name is taken, or an argument breaks a rule above.
    """
    if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
        raise InputError(
            "register_method: name: must be lower-case letters, digits and underscores, "
            f"got {name!r}"
        )
    if not callable(function):
        raise InputError(f"register_method: {name}: function must be callable, got {function!r}")
    earlier = _registered.get(name)
    if name in METHODS or (earlier is not None and _function_of(earlier) is not function):
        kind = "built-in" if name in METHODS else "registered"
        raise InputError(f"register_method: {name}: is the name of a {kind} method")
    _check_parameters(name, parameters)
    if not 1 <= fewest_models <= (most_models or fewest_models):
        raise InputError(
            f"register_method: {name}: fewest_models must be at least 1 and at most most_models, "
            f"got {fewest_models} and {most_models}"
        )
    _registered[name] = MergeMethod(
        name,
        UserFunction(function),
        result="",
        source="",
        parameters=(*parameters, *((SCALE,) if needs_base else ())),
        takes_weights=takes_weights,
        base="required" if needs_base else "unused",
        fewest_models=fewest_models,
        most_models=most_models,
    )


def unregister_method(name: str) -> None:
    """Forgets a registered method; does nothing if there is none of this name."""
    _registered.pop(name, None)


def method_named(name: str) -> MergeMethod:
    """The method of this name.

    Raises:
        InputError: there is none, and the message names the nearest one; or its package fails to
            load.
    """
    if name in METHODS:
        return METHODS[name]
    if name not in _registered:
        _load(name)
    if name in _registered:
        return _registered[name]
    names = list(dict.fromkeys([*METHODS, *_registered, *(entry.name for entry in _offered())]))
    import difflib

    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise InputError(f"method: must be one of {', '.join(names)}, got {name!r}{hint}")


def method_source(method: MergeMethod) -> str | None:
    """Digest of a registered method's code; None for a built-in one."""
    return method.rule.source if isinstance(method.rule, UserFunction) else None


def _offered() -> Sequence[EntryPoint]:
    from importlib.metadata import entry_points

    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _load(name: str) -> None:
    matches = [entry for entry in _offered() if entry.name == name]
    if not matches:
        return
    packages = sorted({entry.dist.name if entry.dist else entry.value for entry in matches})
    if len(packages) > 1:
        raise InputError(f"method: {name}: is offered by several packages: {', '.join(packages)}")
    origin = f"method: {name}: entry point {matches[0].value} of {packages[0]}"
    try:
        matches[0].load()
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{origin}: cannot be loaded: {reason}") from error
    if name not in _registered:
        raise InputError(f"{origin}: does not call register_method({name!r}, ...)")


def _function_of(method: MergeMethod) -> Callable[..., object] | None:
    return method.rule.function if isinstance(method.rule, UserFunction) else None


def _check_parameters(name: str, parameters: Sequence[Parameter]) -> None:
    seen: set[str] = set()
    for parameter in parameters:
        if not isinstance(parameter, Parameter):
            raise InputError(
                f"register_method: {name}: parameters must be of class Parameter, got {parameter!r}"
            )
        key = f"register_method: {name}: parameter {parameter.name}"
        if not parameter.name.isidentifier() or keyword.iskeyword(parameter.name):
            raise InputError(f"{key}: must be a Python name")
        if parameter.name in _TAKEN or parameter.name in seen:
            raise InputError(f"{key}: must not be one of {', '.join(_TAKEN)}, and stand once")
        seen.add(parameter.name)
        if parameter.default is not None:
            try:
                parameter.check("default", parameter.default)
            except InputError as error:
                raise InputError(f"{key}: {error}") from None
