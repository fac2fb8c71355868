"""The kind of a model."""

from types import SimpleNamespace
from typing import Any


def get_model_info_meta(folder: str, model_type: str | None = None) -> Any:
    if model_type is None:
        raise ValueError("Multiple possible types found: ['llama', 'other']")
    return SimpleNamespace(model_dir=folder), SimpleNamespace(model_type=model_type)
