"""The models of a run as evaluate gets them: which arm has which models, and what they cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merit_fast.data import DataConfig, Dataset
from merit_fast.errors import InputError
from merit_fast.evaluate.config import EvaluateConfig
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import ArmResult, BranchManifest

BASE = "base"
JOINT = "joint"


@dataclass(frozen=True)
class EvaluationInputs:
    """The held-out rows and options that every model is measured with.

    ``data_config`` decides how prompts become tokens, as it does for rows.

    Raises:
        InputError: no dataset has held-out rows.
    """

    datasets: Sequence[Dataset]
    tokenizer: Any
    pad_token_id: int
    config: EvaluateConfig
    data_config: DataConfig = field(default=DataConfig())

    def __post_init__(self) -> None:
        if not self.datasets:
            raise InputError(
                "evaluate: no dataset of the mixture has held-out rows; "
                "give one an eval_path or eval_split"
            )


@dataclass(frozen=True)
class MergedArm:
    """One merged model: its directory, its branches and their weights."""

    path: Path
    branches: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class EvaluatedModels:
    """The models to evaluate.

    ``branches`` holds every trained branch and joint run, ``merges`` every merged model. ``arms``
    names an arm's models, one for each seed, by their keys in these two; without it ``joint`` and
    every merge are arms of one seed. ``joint`` names the branches that are joint runs where the
    tables have no arm of them, because another arm has the same model. ``starts`` names the model
    that each branch started from, for branches that are adapters; absent: what the adapter names.
    """

    base: Path
    branches: Mapping[str, Path]
    merges: Mapping[str, MergedArm]
    arms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    joint: tuple[str, ...] = ()
    starts: Mapping[str, Path] = field(default_factory=dict)

    @property
    def models_of_arms(self) -> dict[str, tuple[str, ...]]:
        """arm -> names of its models, in the order of the tables; the base is not among them."""
        if self.arms:
            return dict(self.arms)
        joint = [JOINT] if JOINT in self.branches else []
        merges = sorted(self.merges, key=lambda arm: (arm == "merit", arm))  # merit last
        return {arm: (arm,) for arm in (*joint, *merges)}

    @property
    def interpolated(self) -> tuple[str, ...]:
        """The joint runs that are measured on their way from the base, one for each seed."""
        return self.models_of_arms.get(JOINT, self.joint)

    def path(self, name: str) -> Path:
        """Directory of the base, a branch, a joint run or a merge."""
        if name == BASE:
            return self.base
        return self.merges[name].path if name in self.merges else self.branches[name]

    def shares(self, name: str, config: EvaluateConfig) -> tuple[float, ...]:
        """The shares of a joint run that are measured, (1 - share) base + share model."""
        return config.interpolate if name in self.interpolated else ()

    def branches_of(self, name: str) -> tuple[str, ...]:
        """The trainings behind a model."""
        return self.merges[name].branches if name in self.merges else (name,)


def with_training(result: ArmResult, models: EvaluatedModels, name: str) -> ArmResult:
    """Adds the cost of a model's training, read from its branches' manifests and timings."""
    paths = [models.branches[branch] for branch in models.branches_of(name)]
    manifests = [read_manifest(BranchManifest, path / "branch.json") for path in paths]
    timings = [json.loads((path / "timing.json").read_text()) for path in paths]
    return replace(
        result,
        num_tokens=sum(m.num_tokens for m in manifests),
        num_target_tokens=sum(m.num_target_tokens for m in manifests),
        steps=max(m.steps for m in manifests),
        train_s=sum(t["train_s"] for t in timings),
        peak_memory_bytes=max(t["peak_memory_bytes"] for t in timings),
    )
