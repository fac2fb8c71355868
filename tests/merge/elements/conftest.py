"""Fixtures of the tests of methods that decide by element, row or column."""

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
