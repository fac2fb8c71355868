"""The evaluate stage: measures every arm and branch on the same held-out rows and prompts."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from merit_fast.data import DataConfig, Dataset
from merit_fast.errors import InputError
from merit_fast.evaluate.compare import compare_arms, standard_error
from merit_fast.evaluate.config import EvaluateConfig
from merit_fast.evaluate.items import ItemScores, read_items, write_items
from merit_fast.evaluate.measure import Measurer
from merit_fast.evaluate.models import BASE, JOINT, EvaluatedModels, MergedArm, with_training
from merit_fast.evaluate.weights import Interpolation, displacement
from merit_fast.manifests.io import read_manifest, write_manifest
from merit_fast.manifests.schemas import (
    SCHEMA_VERSION,
    ArmResult,
    DatasetResult,
    EvaluateManifest,
    MergingGain,
)
from merit_fast.model import load_model, without_router_logits
from merit_fast.progress import Progress, Task

__all__ = ["EvaluatedModels", "MergedArm", "evaluate_arms", "mean_result"]

_MEASURES = (
    "loss",
    "token_loss",
    "exact_match",
    "text_loss",
    "chat_nll",
    "answer_length_tokens",
    "displacement",
)


def evaluate_arms(
    models: EvaluatedModels,
    datasets: Sequence[Dataset],
    tokenizer: Any,
    pad_token_id: int,
    config: EvaluateConfig,
    directory: Path,
    progress: Progress,
    data_config: DataConfig | None = None,
) -> EvaluateManifest:
    """Evaluates base, joint, joint interpolated towards the base, every branch and every merge.

    Branches of a merge are measured on the held-out rows only, arms on retention too. Every model
    is loaded and measured once, whatever the number of arms it belongs to. Its result is written as
    ``NAME.json`` and the items' scores of an arm's model as ``NAME.items.safetensors``, so that an
    interrupted run resumes with the next model. ``data_config`` decides how prompts become tokens,
    as it does for rows; None: with the tokenizer's own template.

    Raises:
        InputError: no dataset has held-out rows.
    """
    if not datasets:
        raise InputError(
            "evaluate: no dataset of the mixture has held-out rows; "
            "give one an eval_path or eval_split"
        )
    arms = models.models_of_arms
    joints = models.interpolated
    names = [*models.branches, *models.merges]
    measurer = Measurer(
        datasets, tokenizer, pad_token_id, config, directory, data_config or DataConfig()
    )
    members = _members(models, config.interpolate)
    of_arms = {name for names_of_arm in members.values() for name in names_of_arm}
    every = of_arms.union(names)
    tokens = sum(measurer.num_tokens(retention=name in of_arms) for name in every)
    with progress.task("evaluate", tokens, "tokens") as task:
        evaluator = _Evaluator(models.base, measurer, config, directory, task, of_arms)
        evaluator.measure(BASE, models.base)
        for name in names:
            shares = config.interpolate if name in joints else ()
            evaluator.measure(name, models.path(name), shares, models.starts.get(name))
    results = {name: with_training(evaluator.result(name), models, name) for name in names}
    manifest = EvaluateManifest(
        arms=_arms(evaluator, models, config.interpolate, results),
        branches={name: results[name] for name in models.branches if name not in of_arms},
        merging_gain={
            arm: _gain([models.merges[name] for name in merges], merges, results)
            for arm, merges in arms.items()
            if all(name in models.merges for name in merges)
        },
        comparisons=compare_arms(
            {
                arm: [evaluator.items(name) for name in names_of_arm]
                for arm, names_of_arm in members.items()
            },
            tuple(dataset.num_examples for dataset in datasets),
        ),
    )
    write_manifest(manifest, directory / "evaluate.json")
    return manifest


class _Evaluator:
    """Measures models and keeps each one's result and items in files."""

    def __init__(
        self,
        base: Path,
        measurer: Measurer,
        config: EvaluateConfig,
        directory: Path,
        task: Task,
        of_arms: Set[str],
    ) -> None:
        self.base = base
        self.measurer = measurer
        self.config = config
        self.directory = directory
        self.task = task
        self.of_arms = of_arms  # models whose retention is measured

    def measure(
        self,
        name: str,
        path: Path,
        shares: Sequence[float] = (),
        start: Path | None = None,
    ) -> None:
        """Measures the model at ``path`` and (1 - share) base + share model for every share.

        ``start``: the model that an adapter belongs to.
        """
        wanted = {name: 1.0, **{_interpolated(name, share): share for share in shares}}
        missing = {key: share for key, share in wanted.items() if not self._file(key).exists()}
        for key in wanted.keys() - missing.keys():
            self.task.skip(self.measurer.num_tokens(retention=key in self.of_arms))
        if not missing:
            return
        model = load_model(str(path), self.config.dtype, None if start is None else str(start))
        without_router_logits(model)
        moved = displacement(path, self.base, start)
        line = Interpolation(model, self.base) if missing.keys() - {name} else None
        for key, share in missing.items():
            if line is not None and key != name:
                line.set(share)
            self._measure(key, model, share * moved)

    def _measure(self, name: str, model: nn.Module, displacement: float) -> None:
        if name in self.of_arms:
            result, items = self.measurer.measure(name, model, displacement, self.task)
            write_items(items, self._items_file(name))
        else:
            result = self.measurer.measure_rows(name, model, displacement, self.task)
        write_manifest(_Stored(result), self._file(name))

    def result(self, name: str) -> ArmResult:
        return read_manifest(_Stored, self._file(name)).result

    def items(self, name: str) -> ItemScores:
        return read_items(self._items_file(name))

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def _items_file(self, name: str) -> Path:
        return self.directory / f"{name}.items.safetensors"


@dataclass(frozen=True)
class _Stored:
    result: ArmResult
    schema_version: int = SCHEMA_VERSION


def _interpolated(name: str, share: float) -> str:
    return f"{name}@{share:g}"


def _members(models: EvaluatedModels, shares: Sequence[float]) -> dict[str, tuple[str, ...]]:
    """Every arm with the names of its models: the base first, interpolations after joint."""
    arms = models.models_of_arms
    joint = {JOINT: arms[JOINT]} if JOINT in arms else {}
    names = models.interpolated
    between = {
        _interpolated(JOINT, share): tuple(_interpolated(name, share) for name in names)
        for share in (shares if names else ())
    }
    return {BASE: (BASE,), **joint, **between, **arms}


def _arms(
    evaluator: _Evaluator,
    models: EvaluatedModels,
    shares: Sequence[float],
    results: Mapping[str, ArmResult],
) -> dict[str, ArmResult]:
    """Every arm's result: the mean over its models, with the cost of one seed's training."""
    arms = {}
    for arm, names in _members(models, shares).items():
        of_models = []
        for name in names:
            trained = name.split("@")[0]
            result = results.get(name)
            if result is None:
                result = evaluator.result(name)
                if trained != BASE:
                    result = with_training(result, models, trained)
            of_models.append(result)
        arms[arm] = mean_result(of_models)
    return arms


def mean_result(results: Sequence[ArmResult]) -> ArmResult:
    """The mean over the models of one arm, one for each seed, with its standard errors."""
    if len(results) == 1:
        return results[0]

    def mean(key: str) -> float:
        return float(np.mean([getattr(result, key) for result in results]))

    errors = {key: standard_error([getattr(r, key) for r in results]) for key in _MEASURES}
    datasets = {
        name: DatasetResult(
            float(np.mean([result.datasets[name].loss for result in results])),
            float(np.mean([result.datasets[name].exact_match for result in results])),
            first.num_target_tokens,
            first.num_examples,
        )
        for name, first in results[0].datasets.items()
    }
    return replace(
        results[0],
        **{key: mean(key) for key in (*_MEASURES, "train_s")},
        num_tokens=round(mean("num_tokens")),
        num_target_tokens=round(mean("num_target_tokens")),
        steps=max(result.steps for result in results),
        peak_memory_bytes=max(result.peak_memory_bytes for result in results),
        datasets=datasets,
        num_seeds=len(results),
        errors={key: error for key, error in errors.items() if error is not None},
    )


def _gain(
    merges: Sequence[MergedArm], names: Sequence[str], results: Mapping[str, ArmResult]
) -> MergingGain:
    """The mean gain over the models of an arm, with the weights of the first."""
    branch_losses = [
        sum(
            w * results[branch].token_loss
            for branch, w in zip(merge.branches, merge.weights, strict=True)
        )
        for merge in merges
    ]
    branch_loss = float(np.mean(branch_losses))
    merged_loss = float(np.mean([results[name].token_loss for name in names]))
    return MergingGain(branch_loss - merged_loss, branch_loss, merged_loss, merges[0].weights)
