"""Names and settings of an extracted adapter, as PEFT reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

from merit_fast.merge.lora.targets import Target, shortest_names
from merit_fast.merge.read.adapters.experts import PARAMETER_ORDER
from merit_fast.merge.read.adapters.keys import PREFIX
from merit_fast.merge.read.entries import TensorEntry

# PEFT from this version on reads experts as [experts, out, in] where the model stores them so.
_PEFT_VERSION = "0.19.0"


def factor_keys(targets: Sequence[Target]) -> dict[str, tuple[str, str]]:
    """(key of A, key of B) by target. Parameters of one module nest, the first one innermost."""
    wrapped: dict[str, list[Target]] = {}
    for target in targets:
        if target.kind in ("matrix", "parameter"):
            wrapped.setdefault(target.module, []).append(target)
    keys = {}
    for module, listed in wrapped.items():
        for depth, target in enumerate(reversed(sorted(listed, key=_place))):
            path = f"{PREFIX}{module}{'.base_layer' * depth}"
            keys[target.name] = (f"{path}.lora_A.weight", f"{path}.lora_B.weight")
    return keys


def whole_keys(
    targets: Sequence[Target],
    tuned: Mapping[str, TensorEntry],
    tied: tuple[str, str] | None,
) -> dict[str, str]:
    """Keys of tensors that are saved whole -> names of the fine-tune's tensors.

    A module to save comes with all its tensors. ``tied``: (embedding, head) that are one tensor and
    saved; PEFT reads both.
    """
    lora = {target.module for target in targets if target.kind in ("matrix", "parameter")}
    saved = {target.module for target in targets if target.kind == "whole"}
    keys = {f"{PREFIX}{name}": name for name in tuned if name.rpartition(".")[0] in saved}
    for target in targets:
        if target.kind == "bias":
            wrapper = ".base_layer" if target.module in lora else ""
            keys[f"{PREFIX}{target.module}{wrapper}.bias"] = target.name
    if tied:
        embedding, head = tied
        keys[f"{PREFIX}{head}"] = embedding
    return keys


def extracted_config(
    targets: Sequence[Target],
    everything: Mapping[str, TensorEntry],
    base_config: Mapping[str, Any],
    base: str,
    ties: bool,
) -> dict[str, Any]:
    """adapter_config.json but for ranks.

    Args:
        targets: the changed tensors.
        everything: the base's tensors by name in memory.
        base_config: the base's config.json.
        base: its path.
        ties: whether a saved embedding is the head too.
    """
    linear = [target.module for target in targets if target.kind == "matrix"]
    saved = dict.fromkeys(target.module for target in targets if target.kind == "whole")
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "peft_version": _PEFT_VERSION,
        "base_model_name_or_path": base,
        "task_type": _task_type(base_config),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "target_modules": shortest_names(linear, everything),
        "target_parameters": [t.name for t in targets if t.kind == "parameter"] or None,
        "modules_to_save": list(saved) or None,
        "bias": "all" if any(target.kind == "bias" for target in targets) else "none",
        "fan_in_fan_out": any(t.transposed and t.kind == "matrix" for t in targets),
    }
    return config | {"ensure_weight_tying": True} if ties else config


def rank_name(target: Target) -> str:
    """The name under which PEFT looks a target's rank up."""
    return target.module if target.kind == "matrix" else target.name


def _place(target: Target) -> int:
    return PARAMETER_ORDER.index(target.leaf) if target.leaf in PARAMETER_ORDER else -1


def _task_type(config: Mapping[str, Any]) -> str | None:
    listed = config.get("architectures")
    names = listed if isinstance(listed, list) else []
    is_causal = any(str(name).endswith(("CausalLM", "LMHeadModel")) for name in names)
    return "CAUSAL_LM" if is_causal else None
