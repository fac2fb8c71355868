"""Branches of the tiny model, trained on random rows."""

import numpy as np

from merit_fast.data import Dataset, Example
from merit_fast.progress import SilentProgress
from merit_fast.train import TrainConfig, train_branch
from merit_fast.train.stage import BranchJob


def dataset(name, seed, rows=10):
    generator = np.random.default_rng(seed)
    examples = []
    for _ in range(rows):
        ids = generator.integers(2, 400, generator.integers(5, 12)).astype(np.int32)
        examples.append(Example(ids, np.where(np.arange(len(ids)) < 3, -100, ids).astype(np.int32)))
    return Dataset(name, tuple(examples))


def job(base, *datasets):
    return BranchJob(
        "merit-0", "merit", 0, datasets, str(base), "base-fingerprint", "base-fingerprint"
    )


def train(base, out, config, *datasets):
    out.mkdir()
    return train_branch(job(base, *datasets), config, out, SilentProgress())


def weights(directory):
    from safetensors.torch import load_file

    return {
        k: v
        for file in sorted(directory.glob("model*.safetensors"))
        for k, v in load_file(file).items()
    }


CONFIG = TrainConfig(
    epochs=2, batch_size=4, learning_rate=1e-3, dtype="fp32", max_shard_size="60KB"
)
