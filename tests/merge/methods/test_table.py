"""One table declares the merge methods, and the documentation and the package agree with it."""

import re

import pytest
from support.paths import ROOT

from merit_fast.errors import InputError
from merit_fast.merge import MergeConfig
from merit_fast.merge.parameters import Parameter
from merit_fast.merge.registry import method_named
from merit_fast.merge.table import METHODS, method_table_markdown
from merit_fast.options.parser import parse


def test_the_page_on_the_method_holds_the_table():
    assert method_table_markdown() in (ROOT / "docs" / "method.md").read_text()


def test_a_methods_name_stands_in_the_table_only():
    package = [*(ROOT / "merit_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    files = {name: set() for name in METHODS}
    literals = 0
    for file in package:
        if "merit_fast/kernels/" in file.as_posix():
            continue
        for name in re.findall(r"""["'](\w+)["']""", file.read_text()):
            if name in METHODS:
                files[name].add(file.name)
                literals += 1
    assert all(len(places) <= 3 for places in files.values()), files
    assert literals <= 45


@pytest.mark.parametrize("name, nearest", [("tie", "ties"), ("slurp", "slerp"), ("xyz", None)])
def test_an_unknown_method_is_refused_with_the_nearest_one(name, nearest):
    with pytest.raises(InputError) as error:
        parse(MergeConfig, {"method": name}, "run.yml", "merge")
    hint = f"; did you mean {nearest}?" if nearest else ""
    names = ", ".join(METHODS)
    assert str(error.value) == f"run.yml: merge.method: must be one of {names}, got '{name}'{hint}"


def test_every_method_is_found_by_its_name():
    assert [method_named(name).name for name in METHODS] == list(METHODS)


@pytest.mark.parametrize(
    "least, most, value, text",
    [
        (0.0, 1.0, 1.5, "p: must be between 0 and 1, got 1.5"),
        (2.0, float("inf"), (3.0, 1.0), "p: must be at least 2, got 1.0"),
        (float("-inf"), 0.0, 1.0, "p: must be at most 0, got 1.0"),
        (float("-inf"), float("inf"), float("inf"), "p: must be a finite number, got inf"),
        (float("-inf"), float("inf"), (), "p: must be a number or a list of at least one, got []"),
    ],
)
def test_a_parameter_checks_its_range(least, most, value, text):
    with pytest.raises(InputError, match=re.escape(text)):
        Parameter("p", 0.0, "", least, most).check("p", value)
