"""LoRA adapters as PEFT saves them: the base's tensors that they change, and the factors.

Hu et al. 2021, arXiv 2106.09685; rank-stabilised scaling: Kalajdzievski 2023, arXiv 2312.03732.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import FLOAT_DTYPES
from merit_fast.merge.read.checkpoint import (
    ADAPTER_FILE,
    Checkpoint,
    pickle_hint,
    read_files,
)
from merit_fast.merge.read.companions import is_embedding, is_tied
from merit_fast.merge.read.entries import LowRank, TensorEntry
from merit_fast.merge.read.files import list_directory, quote, read_json
from merit_fast.merge.read.remote import Location
from merit_fast.options.fields import require
from merit_fast.options.parser import parse

ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
# In adapter_config.json: read below, or without consequence for the merged weights.
_KNOWN = {
    *(
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "bias",
    ),
    *(
        "modules_to_save",
        "use_dora",
        "init_lora_weights",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
    ),
    *(
        "revision",
        "inference_mode",
        "peft_version",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
    ),
    *(
        "layers_pattern",
        "lora_dropout",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
        "eva_config",
    ),
    *("ensure_weight_tying", "loftq_config", "corda_config", "lora_ga_config"),
}
_PLAIN_INITS = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
)  # the others change the base's weights
_FACTOR_A = re.compile(r"(.+)\.(lora_A\.weight|lora_embedding_A)")
_NOT_FULL = re.compile(
    r"(.+\.)?(lora_|trainable_tokens|token_adapter|modules_to_save\.|original_module\.).*"
)
_TOO_SLOW = re.compile(
    r"\)[*+{]|(?:.*[*+?{]){3}"
)  # a foreign pattern may not take exponential time


@dataclass(frozen=True)
class AdapterConfig:
    """Keys of adapter_config.json that enter the weights."""

    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(
        default_factory=dict
    )  # pattern of a module's name -> its r
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()
    peft_type: Literal["LORA"] = "LORA"
    bias: Literal["none"] = "none"
    use_dora: Literal[False] = False

    def __post_init__(self) -> None:
        for key, pattern in (
            ("rank_pattern", self.rank_pattern),
            ("alpha_pattern", self.alpha_pattern),
        ):
            for text in pattern:
                require(
                    _is_pattern(text),
                    key,
                    "of regular expressions with at most 2 repetitions, of no group",
                    text,
                )
        for rank in (self.r, *self.rank_pattern.values()):
            require(1 <= rank < 2**31, "r", "positive and below 2^31", rank)
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            require(abs(alpha) < float("inf"), "lora_alpha", "finite", alpha)

    def of_module(self, module: str) -> tuple[int, float]:
        """(r, scaling) of a module, by the first pattern that fits its name or its last parts."""
        rank = self.rank_pattern.get(_fitting(self.rank_pattern, module), self.r)
        alpha = self.alpha_pattern.get(_fitting(self.alpha_pattern, module), self.lora_alpha)
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class Adapter:
    """An adapter directory. A full tensor replaces the base's, before the low-rank change."""

    path: Location
    config: AdapterConfig
    low_rank: dict[str, LowRank]  # by the base's tensor
    full: dict[str, TensorEntry]  # by the base's tensor


def read_adapter(path: Location) -> Adapter:
    """Reads a PEFT LoRA adapter from its config and its header.

    Raises:
        InputError: files are missing or broken; it is not plain LoRA (the key or tensor is named).
    """
    present = list_directory(path)
    if ADAPTER_CONFIG not in present:
        raise InputError(f"{path}: is not an adapter: holds no {ADAPTER_CONFIG}")
    if ADAPTER_FILE not in present:
        raise InputError(f"{path}: holds no {ADAPTER_FILE}{pickle_hint(path, present)}")
    config = _read_config(path / ADAPTER_CONFIG)
    tensors = dict(read_files(path, [ADAPTER_FILE]).tensors)
    low_rank: dict[str, LowRank] = {}
    for key in [key for key in tensors if _FACTOR_A.fullmatch(key)]:
        b_key = key.replace("lora_A.weight", "lora_B.weight").replace(
            "lora_embedding_A", "lora_embedding_B"
        )
        if b_key not in tensors:
            raise InputError(f"{path / ADAPTER_FILE}: {key}: has no {b_key} next to it")
        change = _low_rank(tensors.pop(key), tensors.pop(b_key), config)
        low_rank[change.name] = change
    full: dict[str, TensorEntry] = {}
    for entry in tensors.values():
        name = _base_name(entry)
        if _NOT_FULL.fullmatch(name) or name in full:
            raise InputError(f"{entry.file}: {entry.name}: is no tensor of plain LoRA")
        full[name] = entry
    return Adapter(path, config, low_rank, full)


def check_tied(adapter: Adapter, base: Checkpoint) -> None:
    """Refuses an adapter that changes an input embedding which is the base's head too.

    Raises:
        InputError: it does.
    """
    embeddings = [
        name
        for name in (*adapter.low_rank, *adapter.full)
        if name in base.tensors and is_embedding(name)
    ]
    if embeddings and is_tied(base):
        raise InputError(
            f"{adapter.path / ADAPTER_FILE}: {embeddings[0]}: is the head of {base.path} too "
            "(tie_word_embeddings), "
            "which the adapter did not change"
        )


def _read_config(file: Location) -> AdapterConfig:
    values = read_json(file)
    for key, value in values.items():
        if key not in _KNOWN and value not in (None, False, [], {}):
            raise InputError(
                f"{file}: {quote(key)[1:-1]}: is not of plain LoRA, must be absent, got "
                f"{quote(value)}"
            )
    init = values.get("init_lora_weights")
    if not any(
        init is plain or (init == plain and isinstance(init, str)) for plain in _PLAIN_INITS
    ):
        raise InputError(
            f"{file}: init_lora_weights: must leave the base as it is, got {quote(init)}"
        )
    patterns = [values.get(key) for key in ("rank_pattern", "alpha_pattern")]
    texts = [text for pattern in patterns if isinstance(pattern, dict) for text in pattern]
    numbers = [
        number for pattern in patterns if isinstance(pattern, dict) for number in pattern.values()
    ]
    for text in texts:
        if not text.isprintable():
            raise InputError(f"{file}: {quote(text)}: a pattern must be printable")
    for number in (*numbers, values.get("r"), values.get("lora_alpha")):
        if isinstance(number, int) and abs(number) >= 2**53:
            raise InputError(f"{file}: r and lora_alpha must be below 2^53, got {quote(number)}")
    known = {item.name for item in fields(AdapterConfig)}
    present = {key: value for key, value in values.items() if key in known and value is not None}
    return parse(AdapterConfig, present, str(file))


def _low_rank(a: TensorEntry, b: TensorEntry, config: AdapterConfig) -> LowRank:
    for entry in (a, b):
        if len(entry.shape) != 2:
            raise InputError(
                f"{entry.file}: {entry.name}: must have 2 dimensions, got {list(entry.shape)}"
            )
        if entry.dtype not in FLOAT_DTYPES:
            raise InputError(
                f"{entry.file}: {entry.name}: dtype must be one of {', '.join(FLOAT_DTYPES)}, "
                f"got {entry.dtype}"
            )
    module = (
        _base_name(a)
        .removesuffix(".weight")
        .removesuffix(".lora_A")
        .removesuffix(".lora_embedding_A")
    )
    rank, scaling = config.of_module(module)
    for entry, size in ((a, a.shape[0]), (b, b.shape[1])):
        if size != rank:
            raise InputError(
                f"{entry.file}: {entry.name}: must be of rank {rank} by {ADAPTER_CONFIG}, got "
                f"{size}"
            )
    transposed = a.name.endswith("lora_embedding_A") or config.fan_in_fan_out
    return LowRank(f"{module}.weight", a, b, scaling, transposed)


def _base_name(entry: TensorEntry) -> str:
    """Name of the base's tensor for a full one; a factor keeps its last part."""
    if not entry.name.startswith(_PREFIX):
        raise InputError(f"{entry.file}: {entry.name}: must begin with {_PREFIX}")
    return entry.name.removeprefix(_PREFIX).replace(".base_layer.", ".")


def _is_pattern(text: str) -> bool:
    if _TOO_SLOW.search(text):
        return False
    try:
        re.compile(f"(.*\\.)?({text})$")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _fitting(patterns: Mapping[str, Any], module: str) -> str:
    return next((text for text in patterns if re.match(rf"(.*\.)?({text})$", module)), module)
