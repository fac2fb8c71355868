"""LoRA adapters in PEFT's own folders, where a model is expected."""

import json
from pathlib import Path

from merit_fast.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists()


def adapter_start(folder: Path) -> str:
    """The model that an adapter's config names.

    Raises:
        InputError: the config names none, or is no JSON.
    """
    file = folder / ADAPTER_CONFIG
    try:
        start = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        raise InputError(f"{file}: must be a mapping in JSON") from None
    if not isinstance(start, str) or not start:
        raise InputError(f"{file}: base_model_name_or_path: must name a model, got {start!r}")
    return start
