"""Whether a folder holds an adapter; imports no reader of one."""

from merit_fast.merge.read.files import list_directory
from merit_fast.merge.read.remote import Location

ADAPTER_CONFIG = "adapter_config.json"
_MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def is_adapter(path: Location) -> bool:
    """Whether a directory holds an adapter and no model's weights.

    axolotl saves the base's config.json next to its adapters.
    """
    if not (path / ADAPTER_CONFIG).exists():
        return False
    if not (path / "config.json").exists():
        return True
    return not any(name in _MODEL_FILES for name in list_directory(path))
