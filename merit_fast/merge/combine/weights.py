"""One weight per model, from options and branch.json."""

from collections.abc import Sequence
from typing import Literal

from merit_fast.errors import InputError
from merit_fast.merge.combine.counts import BRANCH_FILE, Unit, has_branch, read_counts
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.remote import Location
from merit_fast.records import replace

Weights = Sequence[float] | Literal["auto", "tokens", "samples", "uniform"]


def resolve_weights(models: Sequence[Location], config: MergeConfig) -> list[float]:
    """``config.weights`` for these models, as numbers that sum to 1 unless ``normalize`` is off.

    Models count alike where the method takes no weights, or where ``config.models`` holds them.

    Raises:
        InputError: models have no token or sample counts (``read_counts``), or branches disagree
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
        unit: Unit = "samples" if config.weights == "samples" else "tokens"
        raw = list(read_counts(models, unit).numbers)
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
    lacking = [model for model in models if not has_branch(model)]
    if len(lacking) == len(models):
        return replace(config, weights="uniform")
    if lacking:
        having = next(model for model in models if model not in lacking)
        names = ", ".join(map(str, lacking))
        rule = f"{names}: no {BRANCH_FILE} with token counts here, but {having} has one"
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
        return f"equal, because no model has a {BRANCH_FILE} with token counts"
    if isinstance(settled, tuple):
        return "as given"
    if settled == "tokens" or settled == "samples":
        return read_counts(models, settled).source
    return "equal, as given"


def require_numbers(config: MergeConfig) -> None:
    """Raises InputError if held-out rows must choose a number first: a merge reads no rows."""
    if config.is_tuned:
        option = "scale: auto" if config.scale == "auto" else "weights: fit"
        raise InputError(
            f"merge.{option} is chosen on held-out rows: merge by a run's CONFIG.yml, or give "
            "--validation NAME=PATH"
        )
