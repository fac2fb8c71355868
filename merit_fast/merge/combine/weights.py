"""One weight per model, from options and branch.json."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from merit_fast.errors import InputError
from merit_fast.manifests.io import read_manifest
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.files import folder_of
from merit_fast.merge.read.remote import Location

Weights = Sequence[float] | Literal["auto", "tokens", "samples", "uniform"]
_BRANCH_FILE = "branch.json"


def resolve_weights(models: Sequence[Location], config: MergeConfig) -> list[float]:
    """``config.weights`` for these models, as numbers that sum to 1 unless ``normalize`` is off.

    Models count alike where the method takes no weights, or where ``config.models`` holds them.

    Raises:
        InputError: a model has no branch.json for token or sample counts, or branches disagree
            about their base; a list's length is wrong; weights or scale are still to be chosen.
    """
    require_numbers(config)
    config = settle_weights(models, config)
    if config.weights == "uniform":
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


def settle_weights(models: Sequence[Location], config: MergeConfig) -> MergeConfig:
    """Replaces weights ``auto``: ``tokens`` where every model has a branch.json, else ``uniform``.

    Weights are ``uniform`` too where the method takes none, or ``config.models`` holds them.

    Raises:
        InputError: some models have a branch.json and others do not.
    """
    has_model_weights = any(model.weight is not None for model in config.models)
    if not config.takes_weights or has_model_weights:
        return replace(config, weights="uniform")
    if config.weights != "auto":
        return config
    lacking = [model for model in models if not (folder_of(model) / _BRANCH_FILE).is_file()]
    if len(lacking) == len(models):
        return replace(config, weights="uniform")
    if lacking:
        having = next(model for model in models if model not in lacking)
        names = ", ".join(map(str, lacking))
        rule = f"{names}: no {_BRANCH_FILE} with token counts here, but {having} has one"
        raise OptionError(rule, "weights", "give {} as uniform or as numbers")
    return replace(config, weights="tokens")


def weights_reason(models: Sequence[Location], config: MergeConfig) -> str:
    """The origin of the weights, in one clause; see ``settle_weights`` for errors."""
    settled = settle_weights(models, config).weights
    if not config.takes_weights:
        return f"none: method {config.method} takes no weights"
    if any(model.weight is not None for model in config.models):
        return "of each model's own settings"
    if config.weights == "auto" and settled == "uniform":
        return f"equal, because no model has a {_BRANCH_FILE} with token counts"
    if isinstance(settled, tuple):
        return "as given"
    words = {"tokens": "token counts", "samples": "example counts"}
    return f"{words[settled]} of each {_BRANCH_FILE}" if settled in words else "equal, as given"


def require_numbers(config: MergeConfig) -> None:
    """Raises InputError if held-out rows must choose a number first: a merge reads no rows."""
    if config.is_tuned:
        option = "scale: auto" if config.scale == "auto" else "weights: fit"
        raise InputError(
            f"merge.{option} is chosen on held-out rows: merge by a run's CONFIG.yml, or give "
            "--validation NAME=PATH"
        )


def _branch_counts(models: Sequence[Location], unit: str) -> list[int]:
    from merit_fast.manifests.schemas import BranchManifest

    branches = []
    for model in models:
        if not (folder_of(model) / _BRANCH_FILE).is_file():
            rule = f"{model}: has no {_BRANCH_FILE} to take its {unit} from"
            raise OptionError(rule, "weights", "give {} as uniform or as numbers")
        branches.append(read_manifest(BranchManifest, folder_of(model) / _BRANCH_FILE))
    for model, branch in zip(models, branches, strict=True):
        if branch.start_fingerprint != branches[0].start_fingerprint:
            raise InputError(
                f"{model / _BRANCH_FILE}: start_fingerprint: must be "
                f"{branches[0].start_fingerprint} as in {models[0]}, "
                f"got {branch.start_fingerprint}"
            )
    counts = [b.num_target_tokens if unit == "tokens" else b.num_examples for b in branches]
    for model, count in zip(models, counts, strict=True):
        if count <= 0:
            raise InputError(
                f"{model / _BRANCH_FILE}: {unit} must be positive to weigh the merge, got {count}"
            )
    return counts
