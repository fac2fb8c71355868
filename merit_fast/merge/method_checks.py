"""Checks of a merge's options against its method: which numbers it takes, and their ranges."""

from typing import Any

from merit_fast.merge.method import MergeMethod
from merit_fast.merge.parameters import (
    BUILT_IN,
    BUILT_IN_NAMES,
    DENSITY,
    EPSILON,
    GAMMA,
    WEIGHT,
)
from merit_fast.merge.rules.kinds import ElementByElement
from merit_fast.options.fields import require
from merit_fast.records import fields


def check_numbers(config: Any, method: MergeMethod) -> None:
    """Raises InputError if ``config``, a MergeConfig, has a number that its method does not take.

    Also if a number lies outside the method's range; the message names the option.
    """
    _check_parameters(config, method)
    _check_own_parameters(config, method)
    _check_models(config, method)


def _check_parameters(config: Any, method: MergeMethod) -> None:
    defaults = {item.name: item.default for item in fields(config)}
    for name in (*BUILT_IN_NAMES, "seed"):
        value = getattr(config, name)
        rule = f"absent: method {config.method} takes no {name}"
        require(method.takes(name) or value == defaults[name], name, rule, value)
    shared = {item.name: item for item in BUILT_IN}
    shared |= {item.name: item for item in method.parameters if item.name in shared}
    for name, parameter in shared.items():
        value = getattr(config, name)
        if value != "auto":
            parameter.check(name, value)
    _check_kind(config, method)


def check_given(config: Any, method: MergeMethod) -> None:
    """Raises InputError if a number without a default is absent, for all models or for one."""
    for parameter in method.parameters:
        name = parameter.name
        if parameter.default is not None or name not in BUILT_IN_NAMES:
            continue
        by_model = [getattr(model, name, None) is not None for model in config.models]
        is_given = getattr(config, name) is not None or (bool(by_model) and all(by_model))
        rule = f"given for method {config.method}"
        require(is_given, name, rule, getattr(config, name))


def _check_kind(config: Any, method: MergeMethod) -> None:
    """Checks the options that go with some kinds of methods only."""
    rule = f"tensor with method {config.method}"
    require(method.takes_vectors or config.vectors == "tensor", "vectors", rule, config.vectors)
    rule = f"absent: method {config.method} enlarges nothing"
    require(method.rescales or config.rescale is None, "rescale", rule, config.rescale)
    rule = f"absent: method {config.method} reads its inputs twice for itself"
    has_stats = not (config.takes_gram or config.vectors != "tensor")
    require(has_stats or not config.stats, "stats", rule, config.stats)
    rule = f"absent: method {config.method} mixes element by element"
    is_mixed = isinstance(method.rule, ElementByElement)
    require(not (config.stats and is_mixed), "stats", rule, config.stats)


def _check_own_parameters(config: Any, method: MergeMethod) -> None:
    values = config.parameters or {}
    declared = {item.name: item for item in method.parameters if item.name not in BUILT_IN_NAMES}
    for name, value in values.items():
        takes = ", ".join(declared) or "none here"
        rule = f"absent: method {config.method} takes {takes}"
        require(name in declared, f"parameters.{name}", rule, value)
    for name, parameter in declared.items():
        is_given = name in values or parameter.default is not None
        require(is_given, f"parameters.{name}", f"given for method {config.method}", None)
        parameter.check(f"parameters.{name}", values.get(name, parameter.default))


def _check_models(config: Any, method: MergeMethod) -> None:
    for i, model in enumerate(config.models):
        for parameter in (DENSITY, GAMMA, EPSILON):
            value = getattr(model, parameter.name)
            key = f"models[{i}].{parameter.name}"
            takes = f"takes no {parameter.name}"
            if method.takes(parameter.name):
                takes = f"has one {parameter.name} for all models"
            rule = f"absent: method {config.method} {takes}"
            require(method.takes_by_model(parameter.name) or value is None, key, rule, value)
            parameter.check(key, value)
        key = f"models[{i}].weight"
        rule = f"absent: method {config.method} takes no weights"
        require(method.takes_weights or model.weight is None, key, rule, model.weight)
        WEIGHT.check(key, model.weight)
