"""The table of stacks and features in docs/integrations/index.md says what the code has."""

import ast
import re
import typing

import pytest
from support.docs.pages import ROOT

from merit_fast.cli.export import FORMATS
from merit_fast.engines.stacks import STACKS
from merit_fast.train.stack.options import Engine

PAGE = ROOT / "docs" / "integrations" / "index.md"
FOLDER = ROOT / "merit_fast" / "integrations"
STACK_NAMES = ("Trainer", "TRL", "axolotl", "LLaMA-Factory", "ms-swift")
# The file through which a stack reaches our code.
MODULES = dict(
    zip(
        STACK_NAMES,
        (
            "per_dataset/callback.py",
            "trl/trainer.py",
            "axolotl.py",
            "llamafactory.py",
            "swift/merit_swift.py",
        ),
        strict=True,
    )
)


def table():
    """Feature -> stack -> cell."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    lines = lines[: next(i for i, line in enumerate(lines) if line.startswith("| page")) + 1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0][1:] == list(STACK_NAMES)
    return {
        row[0].replace("`", ""): dict(zip(STACK_NAMES, row[1:], strict=True)) for row in rows[2:]
    }


def names_in(stack):
    tree = ast.parse((FOLDER / MODULES[stack]).read_text())
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_engines_are_those_that_the_option_takes():
    cells = table()["train.engine"]
    named = {cell.strip("`") for cell in cells.values()}
    assert named | {"builtin"} == set(typing.get_args(Engine)) == {*STACKS, "builtin"}
    assert cells["TRL"] == "`trl`" and cells["ms-swift"] == "`swift`"


def test_export_formats_are_those_that_the_command_takes():
    cells = table()["export --format"].values()
    assert {cell.strip("`") for cell in cells} - {"-"} == set(FORMATS)


@pytest.mark.parametrize("stack", STACK_NAMES)
def test_what_a_stack_has_is_in_its_module(stack):
    rows = table()
    used = names_in(stack)
    counts = {"StackCallback", "MeritCallback", "write_outputs"} & used
    assert (rows["branch.json with counted tokens"][stack] == "yes") == bool(counts)
    tells = {"MeritCallback", "TokenWatch"} & used
    assert (rows["losses per dataset"][stack] == "yes") == bool(tells)
    has_key = "merit_optimizer" in (FOLDER / MODULES[stack]).read_text()
    assert (rows["FusedAdamW by a key of its YAML"][stack] == "yes") == has_key


def test_every_stack_has_a_page_and_adapters_are_read_by_merges():
    rows = table()
    for cell in rows["page"].values():
        (target,) = re.findall(r"\]\(([^)]+)\)", cell)
        assert (PAGE.parent / target).is_file()
    assert set(rows["adapters as branches"].values()) == {"yes"}
    assert set(rows["kernels in the model"].values()) == {"yes"}
