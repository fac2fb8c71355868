"""The kind of a model."""

from types import SimpleNamespace


def get_model_info_meta(folder, model_type=None):
    if model_type is None:
        raise ValueError("Multiple possible types found: ['llama', 'other']")
    return SimpleNamespace(model_dir=folder), SimpleNamespace(model_type=model_type)
