"""Fixtures of the tests of delta methods."""

import faulthandler

import pytest
from support.merge.method_fixtures import backend, written

__all__ = ["backend", "limited", "written"]


@pytest.fixture
def limited():
    """Ends the whole run with a traceback rather than waiting for a search that finds nothing."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
