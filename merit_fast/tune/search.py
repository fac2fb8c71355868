"""Chooses a merge's weights and scale by the losses of merges on held-out rows.

The merges are made in memory. The weights come first, at the configured scale (1 for ``auto``),
then the scale at those weights. Every loss is kept in a file, so that an interrupted search
resumes.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from merit_fast.data import Example, count_target_tokens
from merit_fast.errors import InputError, MeritFastError
from merit_fast.evaluate.losses import mean_loss
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.io import read_manifest, write_manifest
from merit_fast.manifests.schemas import TUNE_FILE, ScaleSearch, TuneManifest, WeightSearch
from merit_fast.merge import MergeConfig, load_merged, resolve_weights
from merit_fast.merge.option_names import OptionError, options_named
from merit_fast.merge.parameters import Setting
from merit_fast.merge.read.remote import Location
from merit_fast.options.parser import to_plain
from merit_fast.progress import Progress, Task
from merit_fast.tune import fit

_LOSSES = "tried.json"
_NOT_OF_MODELS = (
    "weights",
    "scale",
    "dtype",
    "shard_size",
    "stats",
    "checksum",
    "fsync",
    "ridge",
    "tune_rows",
)


@dataclass(frozen=True)
class TuneInputs:
    """The merge to tune: K models, the weights to start from, and the base if there is one."""

    models: Sequence[Location]
    names: tuple[str, ...]
    start: tuple[float, ...]  # sum 1
    base: Location | None


@options_named("yaml")
def tune_merge(
    inputs: TuneInputs,
    examples: Sequence[Example],
    pad_token_id: int,
    batch_size: int,
    config: MergeConfig,
    directory: Path | None,
    progress: Progress,
) -> TuneManifest:
    """Chooses the numbers that ``config`` leaves open: ``weights: fit``, ``scale: auto``, or both.

    Args:
        inputs: the models, their starting weights and the base.
        examples: the held-out rows that choose.
        directory: gets tune.json; holds the losses of an interrupted search, which are used again.
            None: nothing is written.

    Raises:
        InputError: a scale is to be chosen without a base, or there are no rows; see
            ``load_merged``.
        MeritFastError: not even the start has a finite loss.
    """
    if directory is not None and (directory / TUNE_FILE).exists():
        (directory / _LOSSES).unlink(missing_ok=True)
        return read_manifest(TuneManifest, directory / TUNE_FILE)
    if config.scale == "auto" and inputs.base is None:
        raise OptionError("merge: scale auto needs a base model", "base", "give {}")
    if not examples:
        raise InputError("merge: scale auto and weights fit need held-out rows, got none")
    file = None if directory is None else directory / _LOSSES
    total = _count_merges(len(inputs.models), config)
    weights = inputs.start
    weight_search = None
    scale = None
    scale_search = None
    with progress.task("evaluate merges", total, "merges") as task:
        losses = _Losses(inputs, examples, pad_token_id, batch_size, config, file, task)
        if config.weights == "fit":
            fixed: Setting = 1.0 if config.scale == "auto" else config.scale
            weight_search = _search_weights(losses, inputs.start, fixed, config.ridge)
            if weight_search.accepted and weight_search.fitted:
                weights = weight_search.fitted
        if config.scale == "auto":
            scale, scale_search = _search_scale(losses, weights)
    tokens = sum(count_target_tokens(example.labels) for example in examples)
    manifest = TuneManifest(
        inputs.names, weights, scale, len(examples), tokens, weight_search, scale_search
    )
    if directory is not None:
        write_manifest(manifest, directory / TUNE_FILE)
        (directory / _LOSSES).unlink(missing_ok=True)
    return manifest


def starting_weights(
    models: Sequence[Location], config: MergeConfig, start: tuple[float, ...] = ()
) -> tuple[float, ...]:
    """The weights before a search: ``start``, else for a fit those by token counts.

    For a fit they have sum 1.

    Raises:
        InputError: a fit starts from a weight below 0; see ``resolve_weights``.
    """
    is_fit = config.weights == "fit"
    fixed_config = replace(
        config,
        weights=start or ("auto" if is_fit else config.weights),
        scale=1.0 if config.scale == "auto" else config.scale,
        normalize=is_fit or config.normalize,
    )
    weights = tuple(resolve_weights(models, fixed_config))
    if is_fit and min(weights) < 0:
        raise InputError(
            f"merge: weights fit: the weights to start from must be at least 0, got {list(weights)}"
        )
    return weights


def tuning_sentence(tuned: TuneManifest) -> str:
    """One line with the chosen numbers and their effect on the loss."""
    clauses = []
    by_weights = tuned.weight_search
    if by_weights is not None:
        outcome = "fitted" if by_weights.accepted else "kept, no better ones were found"
        last = by_weights.fitted_loss if by_weights.accepted else by_weights.start_loss
        shown = ", ".join(f"{weight:.4g}" for weight in tuned.weights)
        clauses.append(f"weights {shown} ({outcome}): {_change(last, by_weights.start_loss)}")
    by_scale = tuned.scale_search
    if by_scale is not None:
        losses = dict(zip(by_scale.scales, by_scale.losses, strict=True))
        change = _change(losses[tuned.scale or 0.0], losses[1.0])
        clauses.append(f"scale {tuned.scale:g}: {change} at scale 1")
    return f"{'; '.join(clauses)} (nats per target token of {tuned.num_examples} held-out rows)"


def _count_merges(num_models: int, config: MergeConfig) -> int:
    """The most merges that the searches evaluate."""
    count = 0
    if config.weights == "fit":
        count += num_models * (num_models + 1) // 2 + 2
    if config.scale == "auto":
        count += len(fit.SCALES) + 1
    return count


def _search_weights(
    losses: "_Losses", start: fit.Weights, scale: Setting, ridge: float
) -> WeightSearch:
    start_loss = losses.at(start, scale)
    if start_loss is None:
        raise MeritFastError("merge: weights fit: the loss at the token weights is not finite")
    points = fit.weight_points(start) if len(start) > 1 else []
    point_losses = [losses.at(point, scale) for point in points]
    numbers = [math.nan if loss is None else loss for loss in point_losses]
    fitted = fit.fit_weights(start, start_loss, numbers, ridge)
    fitted_loss = None if fitted is None else losses.at(fitted, scale)
    accepted = fitted_loss is not None and fitted_loss < start_loss
    return WeightSearch(
        start, start_loss, tuple(points), tuple(point_losses), fitted, fitted_loss, accepted
    )


def _search_scale(losses: "_Losses", weights: fit.Weights) -> tuple[float, ScaleSearch]:
    tried = {scale: losses.at(weights, scale) for scale in fit.SCALES}
    minimum = fit.parabola_minimum(
        fit.SCALES, [math.nan if loss is None else loss for loss in tried.values()]
    )
    if minimum is not None and minimum not in tried:
        tried[minimum] = losses.at(weights, minimum)
    finite = {scale: loss for scale, loss in tried.items() if loss is not None}
    if not finite:
        raise MeritFastError(
            f"merge: scale auto: the loss is finite at none of {', '.join(map(str, tried))}"
        )
    best = min(finite, key=lambda scale: (finite[scale], abs(scale - 1.0)))
    return best, ScaleSearch(tuple(tried), tuple(tried.values()), minimum)


def _change(after: float | None, before: float | None) -> str:
    shown = ["not finite" if loss is None else f"{loss:.4f}" for loss in (after, before)]
    return f"loss {shown[0]} against {shown[1]}"


class _Losses:
    """Losses of merges in nats per target token, float32; None for a loss that is not finite."""

    def __init__(
        self,
        inputs: TuneInputs,
        examples: Sequence[Example],
        pad_token_id: int,
        batch_size: int,
        config: MergeConfig,
        file: Path | None,
        task: Task,
    ) -> None:
        self.inputs = inputs
        self.examples = examples
        self.file = file
        self.task = task
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.takes_weights = config.takes_weights
        plain = to_plain(config)
        self.options: dict[str, Any] = {
            key: plain[key] for key in plain if key not in _NOT_OF_MODELS
        }
        self.known: dict[str, float | None] = (
            json.loads(file.read_text()) if file and file.exists() else {}
        )

    def at(self, weights: fit.Weights, scale: Setting) -> float | None:
        """The loss of the merge with these weights and this scale."""
        plain: Any = to_plain(_Point(weights, scale))
        key = json.dumps(plain)
        if key not in self.known:
            self.known[key] = self._measure(plain)
            if self.file is not None:
                write_text(self.file, json.dumps(self.known))
        self.task.advance(1)
        return self.known[key]

    def _measure(self, point: dict[str, Any]) -> float | None:
        weights = point["weights"] if self.takes_weights else None
        model = load_merged(
            self.inputs.models,
            weights,
            base=self.inputs.base,
            scale=point["scale"],
            dtype="fp32",
            **self.options,
        )
        device: Any = "cuda" if torch.cuda.is_available() else "cpu"
        loss = mean_loss(model.to(device), self.examples, self.pad_token_id, self.batch_size)
        return loss if math.isfinite(loss) else None


@dataclass(frozen=True)
class _Point:
    """Weights and scale of one merge; its JSON is the key of its loss in the file."""

    weights: fit.Weights
    scale: Setting
