"""The table of split methods: the options, the command line and the documentation follow it."""

import typing

import numpy as np
import pytest
from support.paths import ROOT
from support.split.partitions import NAMES, mixture

from merit_fast.errors import InputError
from merit_fast.options.parser import parse
from merit_fast.split.config import SplitConfig
from merit_fast.split.search import methods
from merit_fast.split.search.methods import METHODS, Assignment, SplitMethod
from merit_fast.split.search.partition import partition_datasets


def documented_methods():
    """Rows (name, summary, paper) of the table of split methods in docs/method.md."""
    lines = (ROOT / "docs" / "method.md").read_text().splitlines()
    start = lines.index("| `split.method` | what it does | published in |") + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        name, summary, paper = (cell.strip() for cell in line.strip("|").split("|"))
        rows.append((name.strip("`"), summary, paper))
    return rows


def test_the_documentation_lists_every_method():
    expected = [(method.name, method.summary, method.paper) for method in METHODS.values()]
    assert documented_methods() == expected


def test_the_option_accepts_exactly_the_methods_of_the_table():
    choices, _ = typing.get_args(typing.get_type_hints(SplitConfig)["method"])
    assert typing.get_args(choices) == tuple(METHODS)
    listed = f"must be one of {', '.join(METHODS)}, got 'magic'"
    with pytest.raises(InputError, match=f"split.method: {listed}"):
        parse(SplitConfig, {"method": "magic"}, "run.yml", "split")
    fields = SplitConfig.__dataclass_fields__
    assert all(name in fields["method"].metadata["help"] for name in METHODS)


def test_an_entry_is_enough_to_add_a_method(monkeypatch):
    def first_alone(search):
        return Assignment((np.arange(len(search.problem.weights)) > 0).astype(int))

    entry = SplitMethod("first", "Puts the first dataset by itself.", first_alone)
    monkeypatch.setitem(methods.METHODS, "first", entry)
    similarity, weights = mixture(0, 5)
    partition = partition_datasets(similarity, weights, NAMES[:5], 2, "first")
    assert partition.labels == (0, 1, 1, 1, 1)
