"""The package's layout: import arrows, light imports, the kernels link, sizes."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.layout.rooms import ARROWS, EXCEPTIONS, INSIDE
from support.paths import PACKAGE, ROOT, package_files

FILES = package_files()


def module_of(file):
    """The dotted name a file is imported by."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts = ["merit_fast", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports_of(file):
    """Modules of merit_fast that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in whole]
        else:
            continue
        yield from (name for name in names if name in MODULES and name != "merit_fast")


IMPORTS = {module: set(imports_of(file)) - {module} for module, file in MODULES.items()}


def room_of(module):
    return module.split(".")[1] if "." in module else "__init__"


def test_imports_follow_the_arrows():
    wrong = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in sorted(targets)
        if room_of(target) not in ARROWS[room_of(module)] | {room_of(module)}
        and (module, target) not in EXCEPTIONS
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", INSIDE)
def test_data_flows_down_inside_a_folder(folder):
    order = INSIDE[folder]
    level = {
        module: order.index(module.split(".")[2])
        for module in MODULES
        if module.startswith(f"merit_fast.{folder}.")
    }
    wrong = [
        f"{module} imports {target}"
        for module, mine in level.items()
        for target in sorted(IMPORTS[module])
        if level.get(target, -1) > mine
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_imports():
    """Imports inside functions count; a package's __init__ only hands on names."""
    unvisited = {module for module, file in MODULES.items() if file.name != "__init__.py"}
    edges = {module: IMPORTS[module] & unvisited for module in unvisited}
    circles = []
    while unvisited:
        leaves = {module for module in unvisited if not edges[module] & unvisited}
        if not leaves:
            circles = sorted(unvisited)
            break
        unvisited -= leaves
    assert not circles, f"a circle runs through some of {circles}"


def test_no_folder_is_crowded():
    crowded = {}
    for top, most in (
        ("merit_fast", 14),
        ("kernels", 14),
        ("bench", 14),
        ("csrc", 14),
        ("tests", 14),
    ):
        for folder in (ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())):
            if "merit_fast/kernels" in folder.as_posix():
                continue
            suffixes = (".py", ".cpp", ".h", ".inl", ".cu")
            count = sum(file.suffix in suffixes for file in folder.iterdir())
            if count > most:
                crowded[str(folder.relative_to(ROOT))] = count
    assert not crowded


def test_nobody_imports_bench_tests_or_the_kernels_folder_by_itself():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert (module or "").split(".")[0] not in ("bench", "tests", "kernels"), file


def test_kernels_is_a_link_without_a_package_of_its_own():
    assert os.readlink(PACKAGE / "kernels") == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
    import merit_fast.kernels.dispatch as dispatch

    assert Path(dispatch.__file__).resolve() == ROOT / "kernels" / "dispatch.py"


@pytest.mark.parametrize(
    "statement,absent",
    [
        ("import merit_fast", ["torch", "transformers", "triton", "numpy"]),
        ("import merit_fast.merge", ["torch", "transformers", "triton"]),
        ("import merit_fast.cli.merge.command", ["torch", "transformers", "triton"]),
        ("import merit_fast.kernels.average", ["torch", "transformers"]),
        ("import merit_fast.cli.main", ["torch", "transformers", "triton"]),
        ("import merit_fast.pipeline.run", ["torch", "transformers"]),
        ("import merit_fast.data", ["torch", "transformers", "datasets", "pyarrow"]),
    ],
)
def test_light_imports_stay_light(statement, absent):
    script = f"import sys; {statement}; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_no_file_outgrows_its_room():
    others = (file for top in ("bench", "tests", "examples") for file in (ROOT / top).rglob("*.py"))
    texts = {str(file.relative_to(ROOT)): file.read_text() for file in (*FILES, *others)}
    long = {name: count for name, text in texts.items() if (count := len(text.splitlines())) > 300}
    assert not long
