"""Paths of the checkout and of its tests."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PACKAGE = ROOT / "merit_fast"
KILL_AT = TESTS / "support" / "kill_at.py"
KILL_DRIVER = TESTS / "support" / "execution" / "kill_driver.py"
HELD_MERGE = TESTS / "support" / "held_merge.py"


def package_files() -> list[Path]:
    """Python files of the package and its kernels, each once: the link to kernels/ is left out."""
    return sorted(
        file
        for folder in (PACKAGE, ROOT / "kernels")
        for file in folder.rglob("*.py")
        if "merit_fast/kernels/" not in file.as_posix()
    )
