"""The numbers of a mergekit recipe as options of a merge, with mergekit's own defaults."""

from collections.abc import Sequence
from typing import Any

from merit_fast.integrations.mergekit.document import Document, Entry, Scope
from merit_fast.integrations.mergekit.settings import has, one_flag, setting
from merit_fast.merge.method import MergeMethod
from merit_fast.merge.parameters import BUILT_IN_NAMES
from merit_fast.merge.table import METHODS

_BY_MODEL = ("weight", "density", "gamma", "epsilon")  # parameters that one model may have
_OF_METHODS = {key: None for method in METHODS.values() for key in method.mergekit.keys}
_OF_METHODS |= {item.name: None for method in METHODS.values() for item in method.parameters}
_WITHOUT_EFFECT = ("int8_mask",)
# mergekit's defaults where they are not ours, or where we have none.
_DEFAULTS = {"density": 1.0, "lambda": 1.0}
_REQUIRED = ("weight", "t")  # mergekit has no default


def check_names(document: Document, method: MergeMethod) -> list[str]:
    """Notes on parameters that the method does not read.

    Raises:
        InputError: a parameter that no method has.
    """
    takes = _keys_of(method)
    by_model = (*_BY_MODEL, "scale")
    known = {*by_model, *_OF_METHODS, "rescale", *_WITHOUT_EFFECT}
    notes = []
    of_models = [entry.scope for section in document.sections for entry in section.entries]
    for scope in [*of_models, *(section.scope for section in document.sections), *document.scopes]:
        for name in scope.values:
            key = f"{scope.key}.{name}"
            if name not in known:
                rule = f"is no parameter; {method.name} takes {', '.join(takes) or 'none'}"
                raise document.error(key, rule)
            if name not in takes:
                notes.append(
                    f"{key}: has no effect with method {method.name}, nor has it in mergekit"
                )
            elif scope in of_models and not _is_by_model(method, name):
                notes.append(f"{key}: has no effect on one model, nor has it in mergekit")
    if method.takes_seed:
        notes.append(
            f"{method.name}: our seed draws the dropped elements, "
            "the others are divided by their probability; "
            "mergekit draws from torch and restores the sum of absolute values"
        )
    return notes


def _is_by_model(method: MergeMethod, name: str) -> bool:
    """Whether mergekit reads a parameter on one model."""
    return name in ("weight", "scale") or method.takes_by_model(name)


def _keys_of(method: MergeMethod) -> list[str]:
    """mergekit's parameters that change the result of a method."""
    names = ["weight"] if method.takes_weights else []
    names += [item.name for item in method.parameters if item.name != "scale"]
    names += method.mergekit.keys
    return names + (["rescale"] if method.mergekit.rescale is not None else [])


def _default(method: MergeMethod, name: str) -> float | None:
    """mergekit's default of a parameter; None: it must be given."""
    if name in _DEFAULTS:
        return _DEFAULTS[name]
    if name in _REQUIRED:
        return None
    return next((item.default for item in method.parameters if item.name == name), None)


def merge_values(
    document: Document, method: MergeMethod, columns: Sequence[Sequence[Entry]], most: int
) -> dict[str, Any]:
    """The recipe's numbers as values of MergeConfig.

    Args:
        columns: the models of every slice.
        most: largest number of models in a slice; smaller slices are filled with weights of 0.
    """
    where = document.where
    takes = _keys_of(method)
    shared = [*(section.scope for section in document.sections), *document.scopes]
    by_model: list[list[Scope]] = []
    for k in range(most):
        lacking = [
            Scope("", {"weight": 0.0}, s) for s, entries in enumerate(columns) if k >= len(entries)
        ]
        of_model = [entries[k].scope for entries in columns if k < len(entries)]
        by_model.append([*lacking, *of_model, *shared])
    values: dict[str, Any] = {"method": method.name}
    if "lambda" in takes:
        values["scale"] = setting("lambda", shared, _default(method, "lambda"), where)
    if "scale" in takes:
        values["scale"] = setting("scale", by_model[0], _default(method, "scale"), where)
    values |= _shared_numbers(method, shared, where)
    declared = {item.name: item for item in method.parameters}
    of_each = [name for name in _BY_MODEL if name in takes and _is_by_model(method, name)]
    if of_each:
        values["models"] = [
            {
                name: setting(name, scopes, _default(method, name), where, declared.get(name))
                for name in of_each
            }
            for scopes in by_model
        ]
    for name in ("normalize", "normalize_weights"):
        if name in takes:
            values["normalize"] = one_flag(name, shared, method.mergekit.normalize, where)
    if method.takes_weights and not any(name.startswith("normalize") for name in takes):
        values["normalize"] = False
    values |= _flags(method, shared, takes, where)
    for name in _REQUIRED:
        if name in takes:
            _check_given(document, columns, name)
    return values


def _shared_numbers(method: MergeMethod, shared: Sequence[Scope], where: str) -> dict[str, Any]:
    """The numbers that all models share: options of a merge, and the method's own parameters."""
    values: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for item in method.parameters:
        if item.name != "scale" and not item.by_model:
            target = values if item.name in BUILT_IN_NAMES else own
            default = _default(method, item.name)
            target[item.name] = setting(item.name, shared, default, where, item)
    return values | ({"parameters": own} if own else {})


def _flags(
    method: MergeMethod, shared: Sequence[Scope], takes: Sequence[str], where: str
) -> dict[str, Any]:
    """mergekit's flags as ``rescale`` and ``vectors``; {} where our defaults are the same."""
    values: dict[str, Any] = {}
    standard = bool(method.mergekit.rescale)
    if "rescale" in takes and one_flag("rescale", shared, standard, where) != standard:
        values["rescale"] = not standard
    if method.takes_vectors:
        values["vectors"] = _vectors(shared, takes, where)
    return values


def _vectors(shared: Sequence[Scope], takes: Sequence[str], where: str) -> str:
    if "filter_wise" in takes:
        return "row" if one_flag("filter_wise", shared, False, where) else "tensor"
    if one_flag("nuslerp_flatten", shared, True, where):
        return "tensor"
    # mergekit's key says rows and takes the vectors along the first dimension, the columns.
    return "column" if one_flag("nuslerp_row_wise", shared, False, where) else "row"


def _check_given(document: Document, columns: Sequence[Sequence[Entry]], name: str) -> None:
    for section, entries in zip(document.sections, columns, strict=True):
        for entry in entries:
            of_model = [entry.scope] if name in _BY_MODEL else []
            if not has(name, [*of_model, section.scope, *document.scopes]):
                key = entry.scope.key if of_model else document.scopes[-1].key
                raise document.error(f"{key}.{name}", f"is required by method {document.method}")
