"""Whether a folder holds an adapter; imports no reader of one."""

from merit_fast.merge.read.files import list_directory
from merit_fast.merge.read.remote import Location

ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(path: Location) -> bool:
    """Whether a directory holds an adapter and no model's weights.

    axolotl saves the base's config.json next to its adapters.
    """
    if not (path / ADAPTER_CONFIG).exists():
        return False
    if not (path / "config.json").exists():
        return True
    return not any(_is_of_model(name) for name in list_directory(path))


def _is_of_model(name: str) -> bool:
    """Whether a file holds weights of a model, in a shard or as a whole."""
    if name.startswith("adapter_model"):
        return False
    return name.startswith("pytorch_model") or name.endswith(".safetensors")
