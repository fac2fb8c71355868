"""Branches of the tiny model, trained on random rows."""

from pathlib import Path

import numpy as np
from torch import Tensor

from merit_fast.data import Dataset, Example
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.progress import SilentProgress
from merit_fast.train import TrainConfig
from merit_fast.train.stage import BranchJob, train_branch


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


CONFIG = TrainConfig(
    epochs=2, batch_size=4, learning_rate=1e-3, dtype="fp32", max_shard_size="60KB"
)
