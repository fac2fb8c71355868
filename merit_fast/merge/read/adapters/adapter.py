"""An adapter directory: its config and its tensors by what they do."""

from dataclasses import dataclass

from merit_fast.errors import InputError
from merit_fast.merge.read.adapters.config import ADAPTER_CONFIG, AdapterConfig, read_config
from merit_fast.merge.read.adapters.keys import Parts, split_keys
from merit_fast.merge.read.checkpoint import ADAPTER_FILE, pickle_hint, read_files
from merit_fast.merge.read.files import list_directory
from merit_fast.merge.read.remote import Location

_MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Adapter:
    """An adapter directory. A whole tensor replaces the base's, before the low-rank change."""

    path: Location
    config: AdapterConfig
    parts: Parts


def is_adapter(path: Location) -> bool:
    """Whether a directory holds an adapter and no model's weights.

    axolotl saves the base's config.json next to its adapters.
    """
    if not (path / ADAPTER_CONFIG).exists():
        return False
    if not (path / "config.json").exists():
        return True
    return not any(name in _MODEL_FILES for name in list_directory(path))


def read_adapter(path: Location) -> Adapter:
    """Reads a PEFT LoRA adapter from its config and its header.

    Raises:
        InputError: files are missing or broken; it is no LoRA that can be merged (the key or
            tensor is named).
    """
    present = list_directory(path)
    if ADAPTER_CONFIG not in present:
        raise InputError(f"{path}: is not an adapter: holds no {ADAPTER_CONFIG}")
    if ADAPTER_FILE not in present:
        raise InputError(f"{path}: holds no {ADAPTER_FILE}{pickle_hint(path, present)}")
    config = read_config(path / ADAPTER_CONFIG)
    parts = split_keys(read_files(path, [ADAPTER_FILE]).tensors.values())
    return Adapter(path, config, parts)
