"""Commands import what they need and nothing else: counted, not timed."""

import subprocess
import sys

import pytest

HEAVY = ("numpy", "yaml", "torch", "transformers", "rich")
# Parts of Python that take a millisecond or more to import. ``inspect`` comes with ``dataclasses``:
# classes on the way of a merge are records.
SLOW = (
    *("concurrent.futures", "ctypes", "dataclasses", "datetime", "difflib", "email", "inspect"),
    *("importlib.metadata", "logging", "platform", "shutil", "socket", "subprocess", "tempfile"),
)
WORK = ("hashlib", "threading", "xxhash", "merit_fast._C")  # only for a merge
SCRIPT = """
import sys
sys.argv = ["merit-fast", *sys.argv[1:]]
from merit_fast.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code
print("MODULES", *sorted(sys.modules))
"""


def modules_of(*words):
    command = [sys.executable, "-c", SCRIPT, *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "MODULES" in result.stdout, result.stderr
    return result.stdout.split("MODULES")[1].split()


def own(modules):
    return [name for name in modules if name.startswith("merit_fast")]


@pytest.mark.parametrize("words", [("merge", "--help"), ("verify", "--help"), ("--help",)])
def test_a_help_text_imports_no_library_and_few_modules(words):
    modules = modules_of(*words)
    assert not set(modules) & {*HEAVY, *SLOW, *WORK}
    assert len(own(modules)) <= 45


def test_the_help_of_merge_imports_nothing_of_the_engine_or_of_other_commands():
    modules = modules_of("merge", "--help")
    others = ("merge.engine", "merge.read", "merge.write", "merge.in_memory", "pipeline", "model")
    unwanted = tuple(f"merit_fast.{name}" for name in others)
    assert not [name for name in modules if name.startswith(unwanted)]


def test_a_merge_of_plain_checkpoints_imports_no_reader_of_other_formats(branches, tmp_path):
    models = [word for path in branches for word in ("--model", str(path))]
    modules = modules_of("merge", str(tmp_path / "out"), *models, "--weights", "uniform")
    assert [name for name in (*HEAVY, *SLOW) if name in modules] == []
    assert set(WORK) <= set(modules)
    rooms = (
        "merge.read.adapters.adapter",
        "merge.read.dcp.metadata",
        "merge.read.names.model_class",
        "merge.read.quantised.match",
        "merge.vocabulary.by_token",
        "merge.write.distcp",
        "merge.engine.quantise.stream",
        "merge.engine.reference",
        "merge.in_memory",
        "merge.lora",
        "merge.folders",
        "manifests.schemas.split",
        "integrations",
    )
    unwanted = tuple(f"merit_fast.{name}" for name in rooms)
    assert not [name for name in modules if name.startswith(unwanted)]
    assert len(own(modules)) <= 147
