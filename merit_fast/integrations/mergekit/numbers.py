"""The numbers of a mergekit recipe as options of a merge, with mergekit's own defaults."""

from collections.abc import Sequence
from typing import Any

from merit_fast.errors import show
from merit_fast.integrations.mergekit.document import Document, Entry, Scope
from merit_fast.integrations.mergekit.settings import has, one_flag, setting
from merit_fast.merge.table import METHODS, MergeMethod

_BY_MODEL = ("weight", "density", "gamma", "epsilon")  # parameters that one model may have
_SHARED = ("t", "select_topk")
_OF_METHODS = {key: None for method in METHODS.values() for key in method.mergekit.keys}
_WITHOUT_EFFECT = ("int8_mask",)
# mergekit's defaults; the others must be given.
_DEFAULTS = {
    "density": 1.0,
    "gamma": 0.01,
    "epsilon": 0.15,
    "scale": 1.0,
    "lambda": 1.0,
    "select_topk": 1.0,
}
_EPS = 1e-8


def check_names(document: Document, method: MergeMethod) -> list[str]:
    """Notes on parameters that the method does not read.

    Raises:
        InputError: a parameter that no method has.
    """
    takes = _keys_of(method)
    by_model = (*_BY_MODEL, "scale")
    known = {*by_model, *_SHARED, *_OF_METHODS, "rescale", *_WITHOUT_EFFECT}
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
            elif scope in of_models and name not in by_model:
                notes.append(f"{key}: has no effect on one model, nor has it in mergekit")
    if method.takes_seed:
        notes.append(
            f"{method.name}: our seed draws the dropped elements, "
            "the others are divided by their probability; "
            "mergekit draws from torch and restores the sum of absolute values"
        )
    return notes


def _keys_of(method: MergeMethod) -> list[str]:
    """mergekit's parameters that change the result of a method."""
    names = ["weight"] if method.takes_weights else []
    names += [name for name in (*_BY_MODEL[1:], *_SHARED) if method.takes(name)]
    names += method.mergekit.keys
    return names + (["rescale"] if method.mergekit.rescale is not None else [])


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
    for name, key in (("lambda", "scale"), ("select_topk", "select_topk"), ("t", "t")):
        if name in takes:
            values[key] = setting(name, shared, _DEFAULTS.get(name), where)
    if "scale" in takes:
        values["scale"] = setting("scale", by_model[0], _DEFAULTS["scale"], where)
    of_each = [name for name in _BY_MODEL if name in takes]
    if of_each:
        values["models"] = [
            {name: setting(name, scopes, _DEFAULTS.get(name), where) for name in of_each}
            for scopes in by_model
        ]
    for name in ("normalize", "normalize_weights"):
        if name in takes:
            values["normalize"] = one_flag(name, shared, method.mergekit.normalize, where)
    _check_fixed(document, method, shared, takes)
    for name in ("weight", "t"):
        if name in takes:
            _check_given(document, columns, name)
    return values


def _check_fixed(
    document: Document, method: MergeMethod, shared: Sequence[Scope], takes: Sequence[str]
) -> None:
    """Refuses values of parameters that mergekit lets choose and this package does not."""
    for name, fixed in (("rescale", bool(method.mergekit.rescale)), ("filter_wise", False)):
        if name in takes and one_flag(name, shared, fixed, document.where) != fixed:
            key = next(scope.key for scope in shared if name in scope.values)
            rule = f"must be {str(fixed).lower()} with method {method.name}"
            raise document.error(f"{key}.{name}", rule)
    for scope in shared:
        has_eps = "eps" in takes and "eps" in scope.values
        if has_eps and setting("eps", [scope], None, document.where) != _EPS:
            rule = f"must be 1e-8, got {show(scope.values['eps'])}"
            raise document.error(f"{scope.key}.eps", rule)


def _check_given(document: Document, columns: Sequence[Sequence[Entry]], name: str) -> None:
    for section, entries in zip(document.sections, columns, strict=True):
        for entry in entries:
            of_model = [entry.scope] if name in _BY_MODEL else []
            if not has(name, [*of_model, section.scope, *document.scopes]):
                key = entry.scope.key if of_model else document.scopes[-1].key
                raise document.error(f"{key}.{name}", f"is required by method {document.method}")
