"""Distributed checkpoints that four ranks of torch.distributed write, once per session."""

from pathlib import Path

import pytest
from support.merge.dcp.checks import run_ranks
from support.merge.dcp.tensors import SEEDS, tiny_llama


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """grid-N, checkpoint-N (as accelerate nests it) and flat-N, and the models' own folders."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks("write", folder)
    for name, seed in SEEDS.items():
        tiny_llama(seed).save_pretrained(folder / f"model-{name}")
    return folder


@pytest.fixture(params=["cpu", "eager"])
def backend(request, monkeypatch):
    monkeypatch.setenv("MERIT_FAST_BACKEND", request.param)
    return request.param
