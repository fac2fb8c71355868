"""adapter_config.json of a joined adapter, and the ranks of experts' layers."""

from collections.abc import Sequence
from typing import Any

from merit_fast.errors import InputError
from merit_fast.merge.read.adapters.adapter import Adapter
from merit_fast.merge.read.adapters.config import Scalings
from merit_fast.merge.read.adapters.folder import ADAPTER_CONFIG
from merit_fast.merge.read.files import read_json

_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_ALIKE = ("base_model_name_or_path", "task_type", "auto_mapping", "revision")
_TARGETS = ("target_parameters", "trainable_token_indices", "fan_in_fan_out", "peft_version")


def layer_ranks(adapter: Adapter, module: str) -> dict[str, tuple[int, float]]:
    """(rank, scaling) by the names under which PEFT looks a module's layers up: its own, or those
    of its parameters.

    Raises:
        InputError: parameters of one module have several ranks, which the files do not keep apart.
    """
    file = adapter.path / ADAPTER_CONFIG
    scalings = Scalings(adapter.config, file)
    names = []
    for target in adapter.config.target_parameters:
        parent, _, leaf = target.rpartition(".")
        if not parent or module == parent or module.endswith(f".{parent}"):
            names.append(f"{module}.{leaf}")
    found = {name: scalings.of(name) for name in names or [module]}
    if len(set(found.values())) > 1:
        raise InputError(
            f"{file}: rank_pattern: gives parameters of {module} several ranks; merge the "
            "adapters with their base"
        )
    return found


def joined_config(adapters: Sequence[Adapter], modules: Sequence[str]) -> dict[str, Any]:
    """The config's keys but rank and alpha.

    Where the adapters choose their modules alike, so does the output; else it names each module.

    Raises:
        InputError: adapters differ in a key that the output can have only once.
    """
    configs = [read_json(adapter.path / ADAPTER_CONFIG) for adapter in adapters]
    for key in _TARGETS[:-1]:
        for adapter, config in zip(adapters, configs, strict=True):
            if _comparable(config.get(key)) != _comparable(configs[0].get(key)):
                raise InputError(
                    f"{adapter.path / ADAPTER_CONFIG}: {key}: must be as in {adapters[0].path}; "
                    "merge adapters that differ there with their base"
                )
    joined: dict[str, Any] = {
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "bias": max((a.config.bias for a in adapters), key=("none", "lora_only", "all").index),
    }
    joined |= {key: configs[0][key] for key in _TARGETS if configs[0].get(key) is not None}
    for key in _ALIKE:
        values = [config.get(key) for config in configs]
        joined[key] = values[0] if all(value == values[0] for value in values) else None
    chosen = [[_comparable(config.get(key)) for key in _SELECTION] for config in configs]
    if all(each == chosen[0] for each in chosen):
        joined |= {key: configs[0].get(key) for key in _SELECTION}
    else:
        joined["target_modules"] = list(modules)
    saved = [name for adapter in adapters for name in adapter.config.modules_to_save]
    joined["modules_to_save"] = list(dict.fromkeys(saved)) or None
    tying = [adapter.config.ensure_weight_tying for adapter in adapters]
    if any(tying) and not all(tying):
        raise InputError(
            f"{adapters[0].path / ADAPTER_CONFIG}: ensure_weight_tying: must be alike in all "
            "adapters; merge them with their base"
        )
    return joined | {"ensure_weight_tying": True} if all(tying) else joined


def _comparable(value: Any) -> Any:
    """A value in which lists are sets and empty is absent."""
    if isinstance(value, list) and all(isinstance(item, (str, int)) for item in value):
        return frozenset(value) or None
    return value or None
