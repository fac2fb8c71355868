"""A tiny base for TRL's trainers."""

import pytest
from support.tiny import make_model, make_tokenizer

pytest.importorskip("trl", reason="trl is not installed")


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    make_tokenizer(folder)
    make_model(folder)
    return folder
