"""adapter_config.json: the keys that enter the weights, and the kinds of adapter that are refused.

Hu et al. 2021, arXiv 2106.09685; rank-stabilised scaling: Kalajdzievski 2023, arXiv 2312.03732.
"""

import math
from typing import Any, Literal

from merit_fast.errors import InputError
from merit_fast.merge.read.adapters.patterns import Patterns, pattern_error
from merit_fast.merge.read.files import quote, read_json
from merit_fast.merge.read.remote import Location
from merit_fast.options.fields import require
from merit_fast.options.parser import parse
from merit_fast.records import field, fields, record

# Keys without consequence for the merged weights: names of modules stand in the weights' file.
_WITHOUT_CONSEQUENCE = (
    "alpha",
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "velora_config",
)
_NOT_IN_WEIGHTS = {
    "alora_invocation_tokens": "aLoRA changes only some tokens, so no weights hold it",
    "kasa_config": "KaSA changes the base before training",
    "layer_replication": "it repeats the base's layers; stack them with slices first",
    "monteclora_config": "MonteCLoRA samples its weights",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "use_qalora": "QALoRA changes quantised groups of inputs",
}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_BASE_CHANGES = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MAX_NUMBER = 2**53
_NO_CHANGE: tuple[Any, ...] = (None, False, [], {})


@record
class AdapterConfig:
    """Keys of adapter_config.json that enter the weights."""

    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)  # pattern of a module's name -> r
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    peft_type: Literal["LORA"] = "LORA"
    bias: Literal["none", "all", "lora_only"] = "none"
    use_dora: bool = False
    lora_bias: bool = False
    ensure_weight_tying: bool = False
    peft_version: str = ""
    # Rows of the input embedding (key ""), or by the module's name.
    token_indices: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, pattern in (
            ("rank_pattern", self.rank_pattern),
            ("alpha_pattern", self.alpha_pattern),
        ):
            for text in pattern:
                error = pattern_error(text)
                require(not error, key, f"of regular expressions ({error})", text)
        for rank in (self.r, *self.rank_pattern.values()):
            require(1 <= rank < 2**31, "r", "positive and below 2^31", rank)
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            require(abs(alpha) < float("inf"), "lora_alpha", "finite", alpha)

    @property
    def peft_number(self) -> tuple[int, int] | None:
        """(major, minor) of the PEFT that wrote the adapter; None where it does not say."""
        numbers = self.peft_version.split(".")
        if len(numbers) < 2 or not all(text.isdecimal() for text in numbers[:2]):
            return None
        return int(numbers[0]), int(numbers[1])


class Scalings:
    """Rank and scaling by module: the first pattern that fits its name or its last parts."""

    def __init__(self, config: AdapterConfig, file: Location) -> None:
        self.config = config
        self._ranks = Patterns(config.rank_pattern, f"{file}: rank_pattern")
        self._alphas = Patterns(config.alpha_pattern, f"{file}: alpha_pattern")

    def of(self, module: str) -> tuple[int, float]:
        """(r, scaling): lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
        rank = int(self._ranks.first(module, self.config.r))
        alpha = self._alphas.first(module, self.config.lora_alpha)
        return rank, alpha / (math.sqrt(rank) if self.config.use_rslora else rank)


def read_config(file: Location) -> AdapterConfig:
    """The config of a LoRA adapter.

    Raises:
        InputError: it is of another kind, of a variant that no weights can hold, or trained on
            changed base weights; a key is unknown; a value breaks a rule.
    """
    values = read_json(file)
    kind = values.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(
            f"{file}: peft_type: must be LORA, got {quote(kind)}; merge this kind with PEFT's "
            "merge_and_unload and save the model"
        )
    known = {item.name for item in fields(AdapterConfig)} | {"trainable_token_indices"}
    for key, value in values.items():
        has_effect = not any(value is each or value == each for each in _NO_CHANGE)
        if has_effect and key in _NOT_IN_WEIGHTS:
            reason = _NOT_IN_WEIGHTS[key]
            raise InputError(f"{file}: {key}: cannot be merged: {reason}; got {quote(value)}")
        if has_effect and key not in known and key not in _WITHOUT_CONSEQUENCE:
            name = quote(key)[1:-1]
            raise InputError(f"{file}: {name}: is unknown and must be absent, got {quote(value)}")
    _check_init(file, values.get("init_lora_weights"))
    if values.get("arrow_config"):
        raise InputError(f"{file}: arrow_config: chooses adapters by token; merge those adapters")
    _check_numbers(file, values)
    values = values | {"token_indices": _token_indices(file, values)}
    values["peft_version"] = str(values.get("peft_version") or "")
    names = {item.name for item in fields(AdapterConfig)}
    present = {key: value for key, value in values.items() if key in names and value is not None}
    return parse(AdapterConfig, present, str(file))


def _check_init(file: Location, init: Any) -> None:
    if any(init is plain or (init == plain and isinstance(init, str)) for plain in _PLAIN_INITS):
        return
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGES):
        raise InputError(
            f"{file}: init_lora_weights: {quote(init)} changes the base before training; save the "
            "adapter with path_initial_model_for_weight_conversion, or merge onto the saved "
            "residual base with init_lora_weights true"
        )
    raise InputError(f"{file}: init_lora_weights: must leave the base as it is, got {quote(init)}")


def _check_numbers(file: Location, values: dict[str, Any]) -> None:
    patterns = [values.get(key) for key in ("rank_pattern", "alpha_pattern")]
    mappings = [pattern for pattern in patterns if isinstance(pattern, dict)]
    for text in (text for mapping in mappings for text in mapping):
        if not text.isprintable():
            raise InputError(f"{file}: {quote(text)}: a pattern must be printable")
    numbers = [number for mapping in mappings for number in mapping.values()]
    for number in (*numbers, values.get("r"), values.get("lora_alpha")):
        if isinstance(number, int) and abs(number) >= _MAX_NUMBER:
            raise InputError(f"{file}: r and lora_alpha must be below 2^53, got {quote(number)}")


def _token_indices(file: Location, values: dict[str, Any]) -> dict[str, list[int]]:
    """Rows by module; those of a bare list belong to the input embedding, under ""."""
    indices = values.get("trainable_token_indices") or {}
    by_module = indices if isinstance(indices, dict) else {"": indices}
    for listed in by_module.values():
        is_list = isinstance(listed, list) and all(
            type(index) is int and 0 <= index < _MAX_NUMBER for index in listed
        )
        if not is_list or len(set(listed)) != len(listed):
            raise InputError(
                f"{file}: trainable_token_indices: must be lists of different integers from 0 on, "
                f"got {quote(listed)}"
            )
    return by_module
