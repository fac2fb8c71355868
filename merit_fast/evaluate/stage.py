"""The evaluate stage: measures every arm and branch on the same held-out rows and prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from merit_fast.evaluate.compare import compare_arms, standard_error
from merit_fast.evaluate.evaluator import Evaluator, interpolated, members_of_arms, take_results
from merit_fast.evaluate.measure import Measurer
from merit_fast.evaluate.models import (
    BASE,
    EvaluatedModels,
    EvaluationInputs,
    MergedArm,
    with_training,
)
from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.schemas import (
    ArmResult,
    DatasetResult,
    EvaluateManifest,
    MergingGain,
)
from merit_fast.progress import Progress

__all__ = ["EvaluatedModels", "MergedArm", "evaluate_arms", "evaluate_model", "mean_result"]

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
    inputs: EvaluationInputs,
    directory: Path,
    progress: Progress,
    measured: Sequence[Path] = (),
) -> EvaluateManifest:
    """Evaluates base, joint, joint interpolated towards the base, every branch and every merge.

    Branches of a merge are measured on the held-out rows only, arms on retention too. Every model
    is loaded and measured once, whatever the number of arms it belongs to. Its result is written as
    ``NAME.json`` and the items' scores of an arm's model as ``NAME.items.safetensors``, so that an
    interrupted run resumes with the next model. ``measured``: folders that ``evaluate_model`` has
    filled with the results of some of these models.
    """
    for folder in measured:
        take_results(folder, directory)
    arms = models.models_of_arms
    names = [*models.branches, *models.merges]
    members = members_of_arms(models, inputs.config.interpolate)
    of_arms = {name for names_of_arm in members.values() for name in names_of_arm}
    measurer = Measurer(inputs, directory)
    every = of_arms.union(names)
    tokens = sum(measurer.num_tokens(retention=name in of_arms) for name in every)
    with progress.task("evaluate", tokens, "tokens") as task:
        evaluator = Evaluator(models, measurer, inputs.config, directory, task, of_arms)
        for name in (BASE, *names):
            evaluator.measure(name)
    results = {name: with_training(evaluator.result(name), models, name) for name in names}
    manifest = EvaluateManifest(
        arms=_arms(evaluator, models, inputs.config.interpolate, results),
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
            tuple(dataset.num_examples for dataset in inputs.datasets),
        ),
    )
    write_manifest(manifest, directory / "evaluate.json")
    return manifest


def evaluate_model(
    name: str,
    models: EvaluatedModels,
    inputs: EvaluationInputs,
    directory: Path,
    progress: Progress,
    base: Path | None = None,
) -> None:
    """Measures one model into ``directory``, as ``evaluate_arms`` does; it takes the result over.

    ``base``: the folder of the base's own result, for every other model.
    """
    if base is not None:
        take_results(base, directory)
    members = members_of_arms(models, inputs.config.interpolate)
    of_arms = {name for names_of_arm in members.values() for name in names_of_arm}
    measurer = Measurer(inputs, directory)
    names = [name, *(interpolated(name, share) for share in models.shares(name, inputs.config))]
    tokens = sum(measurer.num_tokens(retention=each in of_arms) for each in names)
    with progress.task(f"evaluate {name}", tokens, "tokens") as task:
        Evaluator(models, measurer, inputs.config, directory, task, of_arms).measure(name)


def _arms(
    evaluator: Evaluator,
    models: EvaluatedModels,
    shares: Sequence[float],
    results: Mapping[str, ArmResult],
) -> dict[str, ArmResult]:
    """Every arm's result: the mean over its models, with the cost of one seed's training."""
    arms = {}
    for arm, names in members_of_arms(models, shares).items():
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
