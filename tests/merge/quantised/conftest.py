"""The native engine and the NumPy reference, each in turn."""

import pytest


@pytest.fixture(params=["cpu", "eager"])
def backend(request, monkeypatch):
    monkeypatch.setenv("MERIT_FAST_BACKEND", request.param)
    return request.param
