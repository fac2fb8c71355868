"""Options of `train:` as keys of a stack's minimal configuration, and those that no stack takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from merit_fast.errors import InputError, show
from merit_fast.train.adapter.config import ALL_LINEAR, AdapterConfig
from merit_fast.train.config import TrainConfig

# The built-in trainer has them only.
BUILTIN_ONLY = (
    *("freeze", "optimizer", "update_in_backward"),
    *("evaluate_steps", "patience", "budget", "kernels", "shard", "max_shard_size"),
)
# The minimal configuration has them; a user's own configuration has its own.
OF_RECIPE = ("adapter", "gradient_checkpointing", "report_to")
OF_USER = (
    *("epochs", "learning_rate", "batch_size", "accumulation", "warmup_fraction"),
    *("final_fraction", "weight_decay", "beta1", "beta2", "clip_norm", "packing", "dtype"),
    "checkpoint_steps",
)


def check_options(train: TrainConfig) -> None:
    """Refuses options that the stack would not get.

    Raises:
        InputError: an option belongs to the built-in trainer, or into ``engine_config``.
    """
    default = TrainConfig()
    for name in BUILTIN_ONLY:
        value = getattr(train, name)
        if value != getattr(default, name):
            raise InputError(
                f"train.{name}: must be absent with engine {train.engine}, got {show(value)}"
            )
    if train.controls.joint_short:
        raise InputError(
            f"train.controls.joint_short: must be absent with engine {train.engine}, which counts "
            "its steps itself"
        )
    for name in OF_RECIPE if train.engine_config is not None else ():
        if getattr(train, name) != getattr(default, name):
            raise InputError(
                f"train.{name}: must be absent with engine_config, whose own keys hold it"
            )
    if train.report_to and train.engine == "axolotl":
        raise InputError("train.report_to: must be absent with engine axolotl; use engine_config")
    _check_adapter(train)


def recipe_note(train: TrainConfig, given: Sequence[str]) -> str:
    """A note on options of `train:` that a user's own configuration overrules; "": none is given.

    Args:
        train: the recipe.
        given: names of the options that differ from their defaults.
    """
    names = [f"train.{name}" for name in OF_USER if name in given]
    if train.engine_config is None or not names:
        return ""
    return f"train: the recipe is that of {train.engine_config}; not used: {', '.join(names)}"


def given_options(train: TrainConfig) -> list[str]:
    """Names of the options that differ from their defaults."""
    default = TrainConfig()
    names = [field.name for field in fields(TrainConfig)]
    return [name for name in names if getattr(train, name) != getattr(default, name)]


def minimal_keys(train: TrainConfig) -> dict[str, Any]:
    """Keys of the stack for saving, an adapter, checkpointing of activations, and trackers."""
    keys: dict[str, Any] = {"save_steps": train.checkpoint_steps}
    if train.gradient_checkpointing:
        keys["gradient_checkpointing"] = True
    if train.report_to:
        keys["report_to"] = list(train.report_to)
    if train.adapter.is_on:
        makers = {
            "axolotl": _axolotl_adapter,
            "llamafactory": _llamafactory_adapter,
            "swift": _swift_adapter,
        }
        keys |= makers.get(train.engine, _trl_adapter)(train.adapter)
    return keys


def _check_adapter(train: TrainConfig) -> None:
    default = AdapterConfig()
    for name in ("init", "base", "save"):
        value = getattr(train.adapter, name)
        if value != getattr(default, name):
            raise InputError(
                f"train.adapter.{name}: must be {getattr(default, name)} with engine "
                f"{train.engine}, got {value}"
            )
    is_expression = isinstance(train.adapter.targets, str) and train.adapter.targets != ALL_LINEAR
    if is_expression and train.engine in ("axolotl", "llamafactory"):
        raise InputError(
            f"train.adapter.targets: must be {ALL_LINEAR} or names of modules with engine "
            f"{train.engine}, got {show(train.adapter.targets)}"
        )


def _trl_adapter(adapter: AdapterConfig) -> Mapping[str, Any]:
    targets = adapter.targets
    return {
        "use_peft": True,
        "lora_r": adapter.rank,
        "lora_alpha": _number(adapter.alpha),
        "lora_dropout": adapter.dropout,
        "lora_target_modules": [targets] if isinstance(targets, str) else list(targets),
        "lora_modules_to_save": list(adapter.modules_to_save) or None,
        "use_rslora": adapter.kind == "rslora",
        "use_dora": adapter.kind == "dora",
    }


def _axolotl_adapter(adapter: AdapterConfig) -> Mapping[str, Any]:
    is_all = adapter.targets == ALL_LINEAR
    targets = {"lora_target_linear": True}
    return {
        "adapter": "lora",
        "lora_r": adapter.rank,
        "lora_alpha": _number(adapter.alpha),
        "lora_dropout": adapter.dropout,
        **(targets if is_all else {"lora_target_modules": list(adapter.targets)}),
        **(
            {"lora_modules_to_save": list(adapter.modules_to_save)}
            if adapter.modules_to_save
            else {}
        ),
        **({"peft_use_rslora": True} if adapter.kind == "rslora" else {}),
        **({"peft_use_dora": True} if adapter.kind == "dora" else {}),
    }


def _llamafactory_adapter(adapter: AdapterConfig) -> Mapping[str, Any]:
    is_all = adapter.targets == ALL_LINEAR
    saved = ",".join(adapter.modules_to_save)
    return {
        "finetuning_type": "lora",
        "lora_rank": adapter.rank,
        "lora_alpha": _number(adapter.alpha),
        "lora_dropout": adapter.dropout,
        "lora_target": "all" if is_all else ",".join(adapter.targets),
        **({"additional_target": saved} if saved else {}),
        "use_rslora": adapter.kind == "rslora",
        "use_dora": adapter.kind == "dora",
    }


def _swift_adapter(adapter: AdapterConfig) -> Mapping[str, Any]:
    targets = adapter.targets
    is_expression = isinstance(targets, str) and targets != ALL_LINEAR
    modules = [targets] if isinstance(targets, str) else list(targets)
    return {
        "tuner_type": "lora",
        "lora_rank": adapter.rank,
        "lora_alpha": _number(adapter.alpha),
        "lora_dropout": adapter.dropout,
        **({"target_regex": targets} if is_expression else {"target_modules": modules}),
        **({"modules_to_save": list(adapter.modules_to_save)} if adapter.modules_to_save else {}),
        "use_rslora": adapter.kind == "rslora",
        "use_dora": adapter.kind == "dora",
    }


def _number(value: float) -> float | int:
    """The number without a fraction where it has none: the stacks take integers."""
    return int(value) if value == int(value) else value
