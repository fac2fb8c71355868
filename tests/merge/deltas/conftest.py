"""Fixtures of the tests of delta methods."""

import faulthandler

import pytest
from support.merge.delta_cases import DTYPES, models_of


@pytest.fixture(params=["cpu", "eager"])
def backend(request, monkeypatch):
    monkeypatch.setenv("MERIT_FAST_BACKEND", request.param)
    return request.param


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return {
        name: models_of(dtypes, tmp_path_factory.mktemp(name.replace(" ", "-")))
        for name, (dtypes, _) in DTYPES.items()
    }


@pytest.fixture
def limited():
    """Ends the whole run with a traceback rather than waiting for a search that finds nothing."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
