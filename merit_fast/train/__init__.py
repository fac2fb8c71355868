"""Stage two: one group of datasets -> one branch, fine-tuned from the base with no communication."""

from typing import Any

from merit_fast.train.config import TrainConfig

__all__ = ["TrainConfig", "train_branch"]


def __getattr__(name: str) -> Any:
    if name == "train_branch":
        from merit_fast.train.stage import train_branch

        return train_branch
    raise AttributeError(name)
