"""Environments of other stacks, where bench.train.stacks_env has made them."""

from pathlib import Path

import pytest

from bench.train.stacks_env import python_of


def interpreter(stack: str) -> Path:
    """The stack's interpreter; the test is skipped where there is none."""
    python = python_of(stack)
    if not python.exists():
        pytest.skip(f"{stack}: its environment is not there: python -m bench.train.stacks_env")
    return python
