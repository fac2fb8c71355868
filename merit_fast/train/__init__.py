"""The train stage: one group of datasets becomes one branch, fine-tuned without communication.

A base model and a group's rows come in; a directory that transformers loads goes out, with
``branch.json``. The pipeline and ``merit-fast train`` call ``train_branch``.
"""

from typing import TYPE_CHECKING, Any

from merit_fast.train.config import TrainConfig

if TYPE_CHECKING:
    from merit_fast.train.stage import train_branch

__all__ = ["TrainConfig", "train_branch"]


def __getattr__(name: str) -> Any:
    if name == "train_branch":
        from merit_fast.train.stage import train_branch

        return train_branch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
