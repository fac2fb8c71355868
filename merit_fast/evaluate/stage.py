"""The evaluate stage: measures every arm and branch on the same held-out rows and prompts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from merit_fast.data import Dataset
from merit_fast.errors import InputError
from merit_fast.evaluate.config import EvaluateConfig
from merit_fast.evaluate.losses import dataset_results
from merit_fast.evaluate.retention import answers_nll, greedy_answers, text_loss
from merit_fast.evaluate.weights import displacement, interpolate_towards
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.io import read_manifest, write_manifest
from merit_fast.manifests.schemas import (
    SCHEMA_VERSION,
    ArmResult,
    BranchManifest,
    EvaluateManifest,
    MergingGain,
)
from merit_fast.model import load_model
from merit_fast.progress import Progress


@dataclass(frozen=True)
class MergedArm:
    """One merged arm: its directory, its branches and their weights."""

    path: Path
    branches: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class EvaluatedModels:
    """The models to evaluate.

    ``branches`` holds every trained branch, ``joint`` among them if it was trained.
    """

    base: Path
    branches: Mapping[str, Path]
    merges: Mapping[str, MergedArm]
    arms: Mapping[str, tuple[str, ...]]  # arm -> its models, one for each seed


def evaluate_arms(
    models: EvaluatedModels,
    datasets: Sequence[Dataset],
    tokenizer: Any,
    pad_token_id: int,
    config: EvaluateConfig,
    directory: Path,
    progress: Progress,
) -> EvaluateManifest:
    """Evaluates base, joint, joint interpolated towards the base, every branch and every merge.

    Each model's result is written as ``NAME.json`` when it is complete, so that an interrupted run
    resumes with the next model.

    Raises:
        InputError: no dataset has held-out rows.
    """
    if not datasets:
        raise InputError(
            "evaluate: no dataset of the mixture has held-out rows; "
            "give one an eval_path or eval_split"
        )
    evaluator = _Evaluator(models.base, datasets, tokenizer, pad_token_id, config, directory)
    shares = config.interpolate if "joint" in models.branches else ()
    with progress.task(
        "evaluate", 1 + len(models.branches) + len(shares) + len(models.merges), "models"
    ) as task:
        arms = {"base": evaluator.result("base", models.base)}
        task.advance(1)
        branches: dict[str, ArmResult] = {}
        for name, path in models.branches.items():
            branches[name] = _with_training(evaluator.result(name, path), [path])
            task.advance(1, name)
        if "joint" in branches:
            arms["joint"] = branches.pop("joint")
            for share in shares:
                interpolated = evaluator.result(f"joint@{share:g}", models.branches["joint"], share)
                arms[f"joint@{share:g}"] = _with_training(interpolated, [models.branches["joint"]])
                task.advance(1)
        for arm in sorted(models.merges, key=lambda arm: (arm == "merit", arm)):  # merit last
            merge = models.merges[arm]
            paths = [models.branches[name] for name in merge.branches]
            arms[arm] = _with_training(evaluator.result(arm, merge.path), paths)
            task.advance(1, arm)
    gains = {arm: _gain(merge, branches, arms[arm]) for arm, merge in models.merges.items()}
    manifest = EvaluateManifest(arms, branches, gains)
    write_manifest(manifest, directory / "evaluate.json")
    return manifest


class _Evaluator:
    """Measures one model after another on the same rows and keeps each result in a file."""

    def __init__(
        self,
        base: Path,
        datasets: Sequence[Dataset],
        tokenizer: Any,
        pad_token_id: int,
        config: EvaluateConfig,
        directory: Path,
    ) -> None:
        self.base = base
        self.datasets = datasets
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id
        self.config = config
        self.directory = directory

    def result(self, name: str, path: Path, share: float | None = None) -> ArmResult:
        """Measures the model at ``path``, or (1 - share) base + share model if there is a share."""
        file = self.directory / f"{name}.json"
        if file.exists():
            return replace(read_manifest(_Stored, file).result)
        model = load_model(str(path), self.config.dtype)
        if share is not None:
            interpolate_towards(model, self.base, share)
        moved = displacement(path, self.base) * (1.0 if share is None else share)
        result = replace(self._measure(model), displacement=moved)
        write_manifest(_Stored(result), file)
        return result

    def _measure(self, model: nn.Module) -> ArmResult:
        config = self.config
        pad = self.pad_token_id
        rows = dataset_results(model, self.datasets, pad, config.batch_size)
        tokens = sum(row.num_target_tokens for row in rows.values())
        own_prompts, own_answers = greedy_answers(model, self.tokenizer, pad, config.max_new_tokens)
        prompts, answers = self._base_answers(own_prompts, own_answers)
        return ArmResult(
            loss=sum(row.loss for row in rows.values()) / len(rows),
            token_loss=sum(row.loss * row.num_target_tokens for row in rows.values()) / tokens,
            exact_match=sum(row.exact_match for row in rows.values()) / len(rows),
            text_loss=text_loss(model, self.tokenizer, pad),
            chat_nll=answers_nll(model, prompts, answers, pad),
            answer_length_tokens=sum(map(len, own_answers)) / len(own_answers),
            displacement=0.0,
            datasets=rows,
        )

    def _base_answers(
        self, own_prompts: list[list[int]], own_answers: list[list[int]]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and answers of the base, which is the first model that is measured."""
        file = self.directory / "base_answers.json"
        if not file.exists():
            write_text(file, json.dumps({"prompts": own_prompts, "answers": own_answers}) + "\n")
        stored = json.loads(file.read_text())
        return stored["prompts"], stored["answers"]


@dataclass(frozen=True)
class _Stored:
    result: ArmResult
    schema_version: int = SCHEMA_VERSION


def _with_training(result: ArmResult, branches: Sequence[Path]) -> ArmResult:
    """Adds the cost of the arm's training, read from its branches' manifests and timings."""
    manifests = [read_manifest(BranchManifest, path / "branch.json") for path in branches]
    timings = [json.loads((path / "timing.json").read_text()) for path in branches]
    return replace(
        result,
        num_tokens=sum(m.num_tokens for m in manifests),
        num_target_tokens=sum(m.num_target_tokens for m in manifests),
        steps=max(m.steps for m in manifests),
        train_s=sum(t["train_s"] for t in timings),
        peak_memory_bytes=max(t["peak_memory_bytes"] for t in timings),
    )


def _gain(arm: MergedArm, branches: Mapping[str, ArmResult], merged: ArmResult) -> MergingGain:
    mean = sum(
        w * branches[name].token_loss for name, w in zip(arm.branches, arm.weights, strict=True)
    )
    return MergingGain(mean - merged.token_loss, mean, merged.token_loss, arm.weights)
