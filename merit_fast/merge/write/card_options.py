"""Options of a merge as its model card shows them: the method's numbers, the command's flags."""

import json
import shlex
from collections.abc import Iterator
from typing import Any

from merit_fast.merge.config import MergeConfig
from merit_fast.options.parser import to_plain
from merit_fast.records import fields

# Options that change no tensor; the weights stand by the models.
_NOT_OF_TENSORS = (
    "weights",
    "threads",
    "chunk_kib",
    "max_memory",
    "fsync",
    "stats",
    "checksum",
)
_ELSEWHERE = ("weights", "method", "models", "dtype")


def shown_parameters(config: MergeConfig) -> dict[str, Any]:
    """The method's numbers, and every option that is not at its default."""
    method = config.method_entry
    plain = to_plain(config)
    taken = [name for name in plain if method.takes(name) and name != "weights"]
    taken += ["normalize"] * (method.takes_weights and "normalize" not in taken)
    changed = [name for name in _changed(config) if name not in (*taken, "parameters")]
    shown = [name for name in (*taken, *changed) if name not in _ELSEWHERE]
    values = {name: plain[name] for name in shown if plain[name] is not None}
    by_model = {"models": plain["models"]} if config.models else {}
    return values | (plain.get("parameters") or {}) | by_model


def changed_flags(config: MergeConfig) -> Iterator[str]:
    """Flags of the command for every option that is not at its default."""
    by_name = {field.name: field for field in fields(config)}
    for name, value in _changed(config).items():
        flag = by_name[name].metadata["flag"] or "--" + name.replace("_", "-")
        if isinstance(value, bool):
            yield flag if value else flag.replace("--", "--no-", 1)
        else:
            yield f"{flag} {shlex.quote(value_text(value))}"


def _changed(config: MergeConfig) -> dict[str, Any]:
    """Options of the tensors, weights not among them, that are not at their defaults."""
    plain = to_plain(config)
    defaults = {field.name: field.default for field in fields(config)}
    return {
        name: plain[name]
        for name in plain
        if name not in _NOT_OF_TENSORS and getattr(config, name) != defaults[name]
    }


def value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
