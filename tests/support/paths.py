"""Paths of the checkout and of its tests."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
KILL_AT = TESTS / "support" / "kill_at.py"
