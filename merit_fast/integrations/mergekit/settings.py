"""mergekit's parameters as settings: several scopes become one list of cases."""

from collections.abc import Sequence
from typing import Any

from merit_fast.errors import InputError, show
from merit_fast.integrations.mergekit.document import Scope
from merit_fast.merge.parameters import Parameter

_TRUE = ("1", "true", "t", "yes", "y", "on")
_FALSE = ("0", "false", "f", "no", "n", "off")


def has(name: str, scopes: Sequence[Scope]) -> bool:
    return any(name in scope.values for scope in scopes)


def setting(
    name: str,
    scopes: Sequence[Scope],
    default: float | None,
    where: str,
    parameter: Parameter | None = None,
) -> Any:
    """One parameter as data for ``parse``: a number, a gradient or a list of cases.

    Cases are tried in order; the first that fits a tensor counts.

    Args:
        name: mergekit's name of the parameter.
        default: the value where no case fits; None: there is none.
        parameter: our declaration, for its range.

    Raises:
        InputError: not numbers, or numbers outside the range.
    """
    cases: list[dict[str, Any]] = []
    for value, key, number in _cases(name, scopes, where):
        numbers = value["value"] if isinstance(value["value"], list) else [value["value"]]
        converted = [_number(number, parameter, f"{where}: {key}") for number in numbers]
        gradient = converted if isinstance(value["value"], list) else converted[0]
        cases.append({"value": gradient, "filter": value.get("filter"), "slice": number})
    if default is not None:
        cases.append({"value": default, "filter": None, "slice": None})
    for number, case in enumerate(cases):
        if case["filter"] in (None, "*") and case["slice"] is None:
            cases = cases[: number + 1]  # the others never count
            break
    always = len(cases) == 1 and cases[0]["filter"] in (None, "*") and cases[0]["slice"] is None
    return cases[0]["value"] if always else cases


def one_flag(name: str, scopes: Sequence[Scope], default: bool, where: str) -> bool:
    """A parameter that is true or false, and must be one of them for all tensors.

    Raises:
        InputError: it is neither, or both.
    """
    is_first = True
    for value, key, number in _cases(name, scopes, where):
        values = value["value"] if isinstance(value["value"], list) else [value["value"]]
        flags = {_flag(item, f"{where}: {key}") for item in values}
        always = value.get("filter") in (None, "*") and number is None
        if is_first and always and len(flags) == 1:
            return flags.pop()
        if flags != {default}:
            raise InputError(f"{where}: {key}: must be the same for all tensors")
        is_first = False
    return default


def _cases(
    name: str, scopes: Sequence[Scope], where: str
) -> list[tuple[dict[str, Any], str, int | None]]:
    """({value, filter}, key, slice) of every scope that has the parameter, as they are tried."""
    cases = []
    for scope in scopes:
        if name in scope.values:
            key = f"{scope.key}.{name}"
            cases += [(case, key, scope.slice) for case in _plain(scope.values[name], where, key)]
    return cases


def _plain(value: Any, where: str, key: str) -> list[dict[str, Any]]:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        cases = value
    elif isinstance(value, dict):
        cases = [value]
    else:
        return [] if value == [] else [{"value": _scalars(value, where, key)}]
    for case in cases:
        if not isinstance(case, dict):
            raise InputError(
                f"{where}: {key}: a list of filters must hold mappings only, got {show(case)}"
            )
        for name in case:
            if name not in ("value", "filter"):
                raise InputError(
                    f"{where}: {key}.{name}: is not supported; valid keys: value, filter"
                )
        if "value" not in case or not isinstance(case.get("filter"), (str, type(None))):
            raise InputError(
                f"{where}: {key}: must have a value, and a filter that is text, got {show(case)}"
            )
    return [
        case | {"value": _scalars(case["value"], where, key)}
        for case in cases
        if case["value"] != []
    ]


def _scalars(value: Any, where: str, key: str) -> Any:
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, (bool, int, float, str)):
            raise InputError(
                f"{where}: {key}: must be a number, a list of numbers or of filters, got "
                f"{show(item)}"
            )
    return value


def _number(value: Any, parameter: Parameter | None, where: str) -> float:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise InputError(f"{where}: must be a finite number, got {show(value)}")
    if parameter is not None and not parameter.least <= number <= parameter.most:
        raise InputError(f"{where}: must be {parameter.range_text}, got {show(value)}")
    return number


def _flag(value: Any, where: str) -> bool:
    text = str(int(value) if isinstance(value, float) and value in (0, 1) else value).lower()
    if text not in (*_TRUE, *_FALSE):
        raise InputError(f"{where}: must be true or false, got {show(value)}")
    return text in _TRUE
