"""Chooses a merge's weights and scale by losses on held-out rows, of merges that go straight into a model.

Weights first, at the scale given (1 where it is still to be chosen), then the scale at those weights. Every loss is
kept in a file, so that a killed search goes on with the next one.
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
from merit_fast.manifests.io import read_manifest, write_manifest, write_text
from merit_fast.manifests.schemas import TUNE_FILE, ScaleSearch, TuneManifest, WeightSearch
from merit_fast.merge import MergeConfig, load_merged, resolve_weights
from merit_fast.merge.parameters import Setting
from merit_fast.merge.read.remote import Location
from merit_fast.options.fields import to_plain
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
    """What is merged: K models, the numbers their weights are pulled towards, the base where there is one."""

    models: Sequence[Location]
    names: tuple[str, ...]
    start: tuple[float, ...]  # sum 1
    base: Location | None


def tune_merge(
    inputs: TuneInputs,
    examples: Sequence[Example],
    pad_token_id: int,
    batch_size: int,
    config: MergeConfig,
    directory: Path | None,
    progress: Progress,
) -> TuneManifest:
    """Chooses what ``config`` leaves open: ``weights: fit``, ``scale: auto``, or both.

    Args:
        examples: the held-out rows that choose.
        directory: gets tune.json; losses of an interrupted search that lie there are taken. None: nothing is written.

    Raises:
        InputError: a scale without a base, no rows; see ``load_merged``.
        MeritFastError: not even the start has a finite loss.
    """
    if directory is not None and (directory / TUNE_FILE).exists():
        (directory / _LOSSES).unlink(missing_ok=True)
        return read_manifest(TuneManifest, directory / TUNE_FILE)
    if config.scale == "auto" and inputs.base is None:
        raise InputError("merge: scale auto needs a base model; give --base")
    if not examples:
        raise InputError("merge: scale auto and weights fit need held-out rows, got none")
    count, fits = len(inputs.models), config.weights == "fit"
    total = fits * (count * (count + 1) // 2 + 2) + (config.scale == "auto") * (len(fit.SCALES) + 1)
    file = None if directory is None else directory / _LOSSES
    with progress.task("evaluate merges", total, "merges") as task:
        losses = _Losses(inputs, examples, pad_token_id, batch_size, config, file, task)
        weights, found_weights = inputs.start, None
        if fits:
            fixed: Setting = 1.0 if config.scale == "auto" else config.scale
            found_weights = _search_weights(losses, inputs.start, fixed, config.ridge)
            weights = (
                found_weights.fitted if found_weights.accepted and found_weights.fitted else weights
            )
        scale, found_scale = None, None
        if config.scale == "auto":
            scale, found_scale = _search_scale(losses, weights)
    tokens = sum(count_target_tokens(example.labels) for example in examples)
    manifest = TuneManifest(
        inputs.names, weights, scale, len(examples), tokens, found_weights, found_scale
    )
    if directory is not None:
        write_manifest(manifest, directory / TUNE_FILE)
        (directory / _LOSSES).unlink(missing_ok=True)
    return manifest


def starting_weights(
    models: Sequence[Location], config: MergeConfig, given: tuple[float, ...] = ()
) -> tuple[float, ...]:
    """The weights before anything is chosen; for a fit of sum 1, by the models' token counts unless they are given.

    Raises:
        InputError: a weight below 0 for a fit; see ``resolve_weights``.
    """
    fits, scale = config.weights == "fit", 1.0 if config.scale == "auto" else config.scale
    weights = given or ("tokens" if fits else config.weights)
    plain = replace(config, weights=weights, scale=scale, normalize=fits or config.normalize)
    found = tuple(resolve_weights(models, plain))
    if fits and min(found) < 0:
        raise InputError(
            f"merge: weights fit: the weights to start from must be at least 0, got {list(found)}"
        )
    return found


def tuning_sentence(found: TuneManifest) -> str:
    """What was chosen and what it did to the loss, in one line."""
    parts, by_weights, by_scale = [], found.weight_search, found.scale_search
    if by_weights is not None:
        kept = "fitted" if by_weights.accepted else "kept, no better ones were found"
        last = by_weights.fitted_loss if by_weights.accepted else by_weights.start_loss
        shown = ", ".join(f"{weight:.4g}" for weight in found.weights)
        parts.append(f"weights {shown} ({kept}): {_change(last, by_weights.start_loss)}")
    if by_scale is not None:
        losses = dict(zip(by_scale.scales, by_scale.losses, strict=True))
        parts.append(
            f"scale {found.scale:g}: {_change(losses[found.scale or 0.0], losses[1.0])} at scale 1"
        )
    return f"{'; '.join(parts)} (nats per target token of {found.num_examples} held-out rows)"


def _search_weights(
    losses: "_Losses", start: fit.Weights, scale: Setting, ridge: float
) -> WeightSearch:
    start_loss = losses.at(start, scale)
    if start_loss is None:
        raise MeritFastError("merge: weights fit: the loss at the token weights is not finite")
    points = fit.weight_points(start) if len(start) > 1 else []
    found = [losses.at(point, scale) for point in points]
    fitted = fit.fit_weights(
        start, start_loss, [math.nan if loss is None else loss for loss in found], ridge
    )
    fitted_loss = None if fitted is None else losses.at(fitted, scale)
    accepted = fitted_loss is not None and fitted_loss < start_loss
    return WeightSearch(
        start, start_loss, tuple(points), tuple(found), fitted, fitted_loss, accepted
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
    """Nats per target token of merges, float32; None where one is not finite."""

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
        self.pad_token_id, self.batch_size = pad_token_id, batch_size
        self.takes_weights, plain = config.takes_weights, to_plain(config)
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
        models, base = self.inputs.models, self.inputs.base
        weights = point["weights"] if self.takes_weights else None
        model = load_merged(
            models, weights, base=base, scale=point["scale"], dtype="fp32", **self.options
        )
        placed: Any = model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        loss = mean_loss(placed, self.examples, self.pad_token_id, self.batch_size)
        return loss if math.isfinite(loss) else None


@dataclass(frozen=True)
class _Point:
    weights: fit.Weights
    scale: Setting
