"""Branches of the tiny model, trained on random rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from merit_fast.data import Dataset, Example
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.progress import SilentProgress
from merit_fast.train import TrainConfig, loop
from merit_fast.train.stage import BranchJob, train_branch
from merit_fast.train.step import train_step


def dataset(name: str, seed: int, rows: int = 10) -> Dataset:
    generator = np.random.default_rng(seed)
    examples = []
    for _ in range(rows):
        ids = generator.integers(2, 400, generator.integers(5, 12)).astype(np.int32)
        examples.append(Example(ids, np.where(np.arange(len(ids)) < 3, -100, ids).astype(np.int32)))
    return Dataset(name, tuple(examples))


def job(base: Path, *datasets: Dataset) -> BranchJob:
    return BranchJob(
        "merit-0", "merit", 0, datasets, str(base), "base-fingerprint", "base-fingerprint"
    )


def train(base: Path, out: Path, config: TrainConfig, *datasets: Dataset) -> BranchManifest:
    out.mkdir()
    return train_branch(job(base, *datasets), config, out, SilentProgress())


def weights(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {
        k: v
        for file in sorted(directory.glob("model*.safetensors"))
        for k, v in load_file(file).items()
    }


def held_out_rows(seed: int = 7) -> Dataset:
    """Rows unlike those of training, on which the loss rises as the model overfits."""
    generator = np.random.default_rng(seed)
    examples = []
    for length in (9, 6, 11, 7):
        ids = generator.integers(2, 400, length).astype(np.int32)
        labels = np.where(np.arange(length) < 2, -100, ids).astype(np.int32)
        examples.append(Example(ids, labels))
    return Dataset("a", tuple(examples))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the training raise KeyboardInterrupt after so many steps, as a lost machine ends it."""

    def stops(*arguments: Any) -> Any:
        result = train_step(*arguments)
        if result[0].step == step:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(loop, "train_step", stops)


def train_in_two_parts(
    work: BranchJob, config: TrainConfig, out: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> BranchManifest:
    """Trains a branch that is stopped after ``step`` steps and resumes."""
    out.mkdir()
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(KeyboardInterrupt):
            train_branch(work, config, out, SilentProgress())
    return train_branch(work, config, out, SilentProgress())


CONFIG = TrainConfig(
    epochs=2, batch_size=4, learning_rate=1e-3, dtype="fp32", max_shard_size="60KB"
)
