"""The C++ sources: folders, includes without circles, one SplitMix64, names at the border."""

import re

import pytest
from support.paths import ROOT

CSRC = ROOT / "csrc"
FILES = {
    str(path.relative_to(CSRC)): path.read_text()
    for path in sorted(CSRC.rglob("*"))
    if path.suffix in (".cpp", ".h", ".inl")
}
FAMILIES = ("average", "sketch", "cross_entropy", "layers", "optimizer", "search")
# Which folders a folder may include, next to itself. "." is module.cpp.
ARROWS = {
    "common": set(),
    **{family: {"common"} for family in FAMILIES},
    "head": {"common"},
    "header": {"common"},
    "engine": {"common", "average", "engine/read", "engine/boxes", "engine/write"},
    "engine/read": {"common", "average", "engine/boxes"},
    "engine/write": set(),
    "engine/boxes": {"common", "average", "engine", "engine/read"},
    "elements": {"common", "average", "engine", "engine/read", "engine/boxes"},
    "levels": {"common", "head", *FAMILIES},
    ".": {"common", "levels"},
}


def includes_of(text):
    return re.findall(r'^\s*#include "([^"]+)"', text, re.MULTILINE)


def folder_of(name):
    return name.rpartition("/")[0] or "."


def family_files(family):
    return [text for name, text in FILES.items() if folder_of(name) == family]


def circle_of(edges):
    """The nodes left after leaves are taken off again and again: empty where there is no circle."""
    edges = {node: set(targets) for node, targets in edges.items()}
    while leaves := {node for node, targets in edges.items() if not targets & edges.keys()}:
        edges = {node: targets for node, targets in edges.items() if node not in leaves}
    return sorted(edges)


def test_every_include_names_a_file_from_the_root_of_csrc():
    wrong = [
        f"{name}: {include}"
        for name, text in FILES.items()
        for include in includes_of(text)
        if include not in FILES
    ]
    assert not wrong


def test_no_circle_of_includes():
    assert not circle_of({name: includes_of(text) for name, text in FILES.items()})
    assert circle_of({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["a", "b", "c"]


def test_folders_include_along_the_arrows():
    wrong = [
        f"{name}: {include}"
        for name, text in FILES.items()
        for include in includes_of(text)
        if folder_of(include) not in ARROWS[folder_of(name)] | {folder_of(name)}
    ]
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_the_same_files_and_one_table(family):
    header, body = FILES[f"{family}/{family}.h"], FILES[f"{family}/{family}.inl"]
    assert f"{family}/bindings.cpp" in FILES
    [table] = re.findall(r"^struct (\w+Kernels) \{$", header, re.MULTILINE)
    assert len(re.findall(rf"^extern const {table} \w+ = \{{$", body, re.MULTILINE)) == 1
    assert (
        sum(
            re.findall(r"extern const \w+Kernels \w+ =", text) != []
            for text in family_files(family)
        )
        == 1
    )


def test_no_file_is_long():
    lengths = {name: text.count("\n") for name, text in FILES.items()}
    cuda = (CSRC / "cuda" / "sketch_linear.cu").read_text()
    assert max(*lengths.values(), cuda.count("\n")) <= 300


def test_splitmix64_is_written_once():
    """And once more in csrc/cuda/, a file that NVRTC compiles without headers."""
    holders = [name for name, text in FILES.items() if "bf58476d1ce4e5b9" in text.lower()]
    assert holders == ["common/splitmix64.inl"]
    assert (CSRC / "cuda" / "sketch_linear.cu").read_text().lower().count("bf58476d1ce4e5b9") == 1


def test_structs_cross_the_border_by_name():
    """No tuple, and no argument by position, but for a function that has none."""
    for name, text in FILES.items():
        if not name.endswith("bindings.cpp"):
            continue
        assert "std::tuple" not in text and "std::get<" not in text, name
        definitions = len(re.findall(r'm\.def\(|\.def\(\s*"__init__"', text))
        assert definitions == text.count("nb::kw_only()"), name


@pytest.mark.parametrize("family", FAMILIES)
def test_one_file_of_a_family_calls_the_native_module(family):
    callers = [
        path.name
        for path in (ROOT / "kernels" / family).glob("*.py")
        if re.search(r"dispatch\.native(_module)?\(", path.read_text())
    ]
    assert callers == ["_native.py"]
