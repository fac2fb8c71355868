"""One weight per model, from options and branch.json."""

from collections.abc import Sequence
from typing import Literal

from merit_fast.errors import InputError
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.read.remote import Location

Weights = Sequence[float] | Literal["tokens", "samples", "uniform"]


def resolve_weights(models: Sequence[Location], config: MergeConfig) -> list[float]:
    """``config.weights`` for these models, as numbers that sum to 1 unless ``normalize`` is off.

    Models count alike where the method takes no weights, or where ``config.models`` holds them.

    Raises:
        InputError: a model has no branch.json for token or sample counts, or branches disagree
            about their base; a list's length is wrong; weights or scale are still to be chosen.
    """
    require_numbers(config)
    has_model_weights = any(model.weight is not None for model in config.models)
    if config.weights == "uniform" or not config.takes_weights or has_model_weights:
        raw = [1.0] * len(models)
    elif isinstance(config.weights, tuple):
        if len(config.weights) != len(models):
            raise InputError(
                f"merge.weights: must list {len(models)} numbers, got {len(config.weights)}"
            )
        raw = list(config.weights)
    else:
        raw = [float(count) for count in _branch_counts(models, config.weights)]
        return [count / sum(raw) for count in raw]  # counts are always normalised
    total = sum(raw) if config.normalize else 1.0
    return [weight / total for weight in raw]


def require_numbers(config: MergeConfig) -> None:
    """Raises InputError if held-out rows must choose a number first: a merge reads no rows."""
    if config.is_tuned:
        option = "scale: auto" if config.scale == "auto" else "weights: fit"
        raise InputError(
            f"merge.{option} is chosen on held-out rows: merge by a run's CONFIG.yml, or give "
            "--validation NAME=PATH"
        )


def _branch_counts(models: Sequence[Location], unit: str) -> list[int]:
    branches = []
    for model in models:
        if not (model / "branch.json").is_file():
            raise InputError(
                f"{model}: has no branch.json to take its {unit} from; give weights as a list, "
                "or --weights uniform"
            )
        branches.append(read_manifest(BranchManifest, model / "branch.json"))
    for model, branch in zip(models, branches, strict=True):
        if branch.start_fingerprint != branches[0].start_fingerprint:
            raise InputError(
                f"{model / 'branch.json'}: start_fingerprint: must be "
                f"{branches[0].start_fingerprint} as in {models[0]}, "
                f"got {branch.start_fingerprint}"
            )
    counts = [b.num_target_tokens if unit == "tokens" else b.num_examples for b in branches]
    for model, count in zip(models, counts, strict=True):
        if count <= 0:
            raise InputError(
                f"{model / 'branch.json'}: {unit} must be positive to weigh the merge, got {count}"
            )
    return counts
