"""Held-out losses, exact match and retention of every arm; the controls that cost no training; the merging gain."""

from typing import Any

from merit_fast.evaluate.config import EvaluateConfig

__all__ = ["EvaluateConfig", "evaluate_arms"]


def __getattr__(name: str) -> Any:
    if name == "evaluate_arms":
        from merit_fast.evaluate.stage import evaluate_arms

        return evaluate_arms
    raise AttributeError(name)
