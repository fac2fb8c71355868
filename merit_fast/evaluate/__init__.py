"""Measures every arm of a run on the held-out rows and on fixed prompts.

Checkpoints and tokenized rows come in; evaluate.json (losses, exact match, retention, merging gain)
and, on request, audit.json go out. The pipeline calls it; tune uses its losses.
"""

from typing import TYPE_CHECKING, Any

from merit_fast.evaluate.config import EvaluateConfig

if TYPE_CHECKING:
    from merit_fast.evaluate.stage import evaluate_arms, evaluate_model

__all__ = ["EvaluateConfig", "evaluate_arms", "evaluate_model"]


def __getattr__(name: str) -> Any:
    if name in ("evaluate_arms", "evaluate_model"):
        from merit_fast.evaluate import stage

        return getattr(stage, name)
    raise AttributeError(name)
