"""Fixtures of the tests of methods that run on both backends and on models of all dtypes."""

from typing import Any

import pytest
from support.merge.delta_cases import DTYPES, models_of


@pytest.fixture(params=["cpu", "eager"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MERIT_FAST_BACKEND", str(request.param))
    return str(request.param)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        name: models_of(dtypes, tmp_path_factory.mktemp(name.replace(" ", "-")))
        for name, (dtypes, _) in DTYPES.items()
    }
