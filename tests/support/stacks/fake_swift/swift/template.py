"""The template of a kind."""

from types import SimpleNamespace


def get_template_meta(info, meta, template_type=None):
    return SimpleNamespace(template_type=template_type or "dummy")
