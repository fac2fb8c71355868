"""Registration of merge methods: entry points, refusals, errors of functions."""

import json
import re
import sys

import numpy as np
import pytest
from support.merge.own_methods import largest

from merit_fast.errors import InputError
from merit_fast.merge import (
    MergeConfig,
    Parameter,
    merge_models,
    register_method,
)
from merit_fast.merge.registry import method_named, unregister_method


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "broken",
            "method: broken: entry point offers_broken of offers: cannot be loaded: "
            "RuntimeError: no licence found",
        ),
        (
            "absent",
            "method: absent: entry point offers_merging of offers: "
            "does not call register_method('absent', ...)",
        ),
        ("offred", "got 'offred'; did you mean offered?"),
    ],
)
def test_an_entry_point_that_fails_is_one_line(site, monkeypatch, name, message):
    monkeypatch.syspath_prepend(site)
    sys.modules.pop("offers_merging", None)
    try:
        with pytest.raises(InputError, match=re.escape(message) + "$") as error:
            method_named(name)
        assert "\n" not in str(error.value)
    finally:
        unregister_method("offered")


def test_built_in_names_load_no_entry_point(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    sys.modules.pop("offers_merging", None)
    assert method_named("linear").name == "linear"
    assert "offers_merging" not in sys.modules


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ties", largest), "register_method: ties: is the name of a built-in method"),
        (
            ("power_mean", largest),
            "register_method: power_mean: is the name of a registered method",
        ),
        (("Big", largest), "register_method: name: must be lower-case letters"),
        (("big", 3), "register_method: big: function must be callable, got 3"),
    ],
)
def test_a_registration_that_breaks_a_rule_is_refused(arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        register_method(*arguments)


@pytest.mark.parametrize(
    "parameter, message",
    [
        (Parameter("weights", 1.0, ""), "parameter weights: must not be one of"),
        (Parameter("a b", 1.0, ""), "parameter a b: must be a Python name"),
        (Parameter("p", 5.0, "", 0.0, 1.0), "parameter p: default: must be between 0 and 1, got 5"),
    ],
)
def test_a_parameter_that_breaks_a_rule_is_refused(parameter, message):
    with pytest.raises(InputError, match=f"register_method: big: {message}"):
        register_method("big", largest, parameters=[parameter])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parameters": {"power": 9.0}}, "parameters.power: must be between 1 and 4, got 9.0"),
        ({"parameters": {"powr": 2.0}}, "parameters.powr: must be absent: .* takes power"),
        ({"density": 0.5}, "density: must be absent: method power_mean takes no density"),
        (
            {"method": "ties", "density": 1.0, "parameters": {"x": 1.0}},
            "parameters.x: must be absent",
        ),
    ],
)
def test_options_of_a_registered_method_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        MergeConfig(**{"method": "power_mean", **options})


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda deltas, weights: deltas[0][:-1], "must return shape"),
        (lambda deltas, weights: deltas[0] * np.nan, "must return finite numbers"),
        (lambda deltas, weights: 1 / 0, "failed: ZeroDivisionError: division by zero"),
        (lambda deltas, weights: deltas[0].astype(str), "must return real numbers"),
    ],
)
def test_a_function_that_fails_is_one_line_with_tensor_and_method(
    models, tmp_path, function, message
):
    register_method("bad", function)
    try:
        with pytest.raises(InputError, match=rf"^merge: [\w.]+: method bad: {message}") as error:
            merge_models(models[:2], "uniform", models[3], out=tmp_path / "out", method="bad")
    finally:
        unregister_method("bad")
    assert "\n" not in str(error.value)


def test_a_changed_function_is_another_merge(models, tmp_path):
    arguments = {"base": models[3], "out": tmp_path / "out", "method": "mine"}
    fingerprints = []
    for factor in (1.0, 2.0):
        source = {}
        exec(f"def mine(deltas, weights):\n    return {factor} * deltas[0]\n", {}, source)
        register_method("mine", source["mine"])
        try:
            merge_models(models[:2], "uniform", **arguments)
        finally:
            unregister_method("mine")
        stage = json.loads((tmp_path / "out" / "stage.json").read_text())
        fingerprints.append(stage["fingerprint"])
    assert fingerprints[0] != fingerprints[1]
