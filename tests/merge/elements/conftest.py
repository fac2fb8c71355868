"""Fixtures of the tests of methods that decide by element, row or column."""

from support.merge.method_fixtures import backend, written

__all__ = ["backend", "written"]
