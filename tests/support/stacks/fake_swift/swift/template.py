"""The template of a kind."""

from types import SimpleNamespace
from typing import Any


def get_template_meta(info: Any, meta: Any, template_type: str | None = None) -> Any:
    return SimpleNamespace(template_type=template_type or "dummy")
