"""A help text imports what its command needs and nothing else: counted, not timed."""

import subprocess
import sys

import pytest

HEAVY = ("numpy", "yaml", "torch", "transformers", "xxhash", "rich", "merit_fast._C")
STANDARD = ("difflib", "hashlib", "importlib.metadata", "logging", "shutil", "threading")
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


@pytest.mark.parametrize("words", [("merge", "--help"), ("verify", "--help"), ("--help",)])
def test_a_help_text_imports_no_library_and_few_modules(words):
    modules = modules_of(*words)
    assert not set(modules) & {*HEAVY, *STANDARD}
    assert len([name for name in modules if name.startswith("merit_fast")]) <= 48


def test_the_help_of_merge_imports_nothing_of_the_engine_or_of_other_commands():
    modules = modules_of("merge", "--help")
    others = ("merge.engine", "merge.read", "merge.write", "merge.in_memory", "pipeline", "model")
    unwanted = tuple(f"merit_fast.{name}" for name in others)
    assert not [name for name in modules if name.startswith(unwanted)]
