"""Models loaded by a merge, and their comparison."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.merge.merges import METHODS
from torch import Tensor

SOME = [METHODS[k] for k in (0, 2, 7, 9)]


def assert_same_model(loaded: Any, expected: Any) -> None:
    """Class, every parameter and buffer bit for bit, tied weights, mode and generation options."""
    assert type(loaded) is type(expected) and not loaded.training
    mine = loaded.state_dict()
    theirs = expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in loaded.named_buffers())
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in expected.named_parameters()]
    assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
    assert loaded.config.dtype == expected.config.dtype


def copied(model: Path, path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a one-file model after ``change`` of its tensors."""
    shutil.copytree(model, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def change_config(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
