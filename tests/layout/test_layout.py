"""The house stands as drawn: import arrows, light imports, the kernels link, what a wheel carries."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "merit_fast"
STAGES = {"split", "train", "merge", "evaluate", "report"}
# Who may be imported by whom: a room sees the rooms listed here and itself.
BASE = {"errors", "config", "manifest", "schemas", "progress"}
ARROWS = {
    "errors": set(),
    "config": {"errors"},
    "schemas": set(),
    "manifest": {"errors", "config", "schemas"},
    "progress": set(),
    "kernels": {"errors"},
    "data": {"errors", "config", "manifest"},
    "model": {"errors", "data"},
    **{stage: BASE | {"data", "model", "kernels"} for stage in STAGES},
    "merge": BASE | {"model", "kernels"},
    "report": BASE,
    "demo": BASE,
    "doctor": {"kernels", "manifest"},
    "run_config": BASE | STAGES | {"data", "strict_yaml"},
    "arms": BASE | {"data", "run_config"},
    "outputs": BASE | {"arms", "data", "merge", "model", "run_config", "train"},
    "tune": BASE | {"merge", "evaluate", "data", "model"},
    "pipeline": BASE | STAGES | {"data", "model", "run_config", "arms", "outputs", "tune"},
    "integrations": BASE | {"merge", "model", "strict_yaml", "split", "kernels"},
    "arguments": {"errors"},
    "strict_yaml": {"errors"},
    "merge_command": BASE | {"merge", "integrations"},
    "cli": BASE
    | STAGES
    | {
        "data",
        "model",
        "run_config",
        "pipeline",
        "doctor",
        "demo",
        "arguments",
        "merge_command",
        "tune",
    },
    "__init__": {"errors", "pipeline", "run_config", "split", "train"},
}


def rooms():
    for file in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        relative = file.relative_to(ROOT)
        room = "kernels" if relative.parts[0] == "kernels" else Path(relative.parts[1]).stem
        yield room, file


def imported_rooms(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "merit_fast"
                else [node.module]
            )
        for name in names:
            parts = name.split(".")
            if parts[0] == "merit_fast" and len(parts) > 1:
                yield parts[1]


def test_imports_follow_the_arrows():
    wrong = [
        f"{file.relative_to(ROOT)} imports merit_fast.{target}"
        for room, file in rooms()
        for target in imported_rooms(file)
        if target != room and target not in ARROWS[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_bench_tests_or_the_kernels_folder_by_itself():
    for _, file in rooms():
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
        ("import merit_fast.cli.merge", ["torch", "transformers", "triton"]),
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


def test_a_wheel_carries_every_file_and_builds_without_a_compiler(tmp_path):
    environment = {**os.environ, "MERIT_FAST_NO_NATIVE": "1"}
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        str(ROOT),
        "-w",
        tmp_path,
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for _, file in rooms():
        inside = file.relative_to(ROOT)
        inside = Path("merit_fast") / inside if inside.parts[0] == "kernels" else inside
        assert str(inside) in names, inside
    assert {"merit_fast/report/page.html.j2", "merit_fast/evaluate/general_text.txt"} <= names
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)


def test_a_failing_compiler_is_said_and_does_not_fail_the_install(tmp_path):
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    command = [
        sys.executable,
        str(ROOT / "setup.py"),
        "build_ext",
        "--build-lib",
        tmp_path,
        "--build-temp",
        tmp_path,
    ]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (
        "the native CPU kernels were NOT built" in result.stderr
        and "merit-fast doctor" in result.stderr
    )
    assert not list(tmp_path.rglob("_C*.so"))


def test_no_file_outgrows_its_room():
    long = {
        str(f.relative_to(ROOT)): n
        for _, f in rooms()
        if (n := len(f.read_text().splitlines())) > 350
    }
    assert not long
