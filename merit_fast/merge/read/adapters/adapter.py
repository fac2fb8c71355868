"""An adapter directory: its config and its tensors by what they do."""

from merit_fast.errors import InputError
from merit_fast.merge.read.adapters.config import AdapterConfig, read_config
from merit_fast.merge.read.adapters.folder import ADAPTER_CONFIG
from merit_fast.merge.read.adapters.keys import Parts, split_keys
from merit_fast.merge.read.checkpoint import ADAPTER_FILE, pickle_hint, read_files
from merit_fast.merge.read.files import list_directory
from merit_fast.merge.read.remote import Location
from merit_fast.records import record


@record
class Adapter:
    """An adapter directory. A whole tensor replaces the base's, before the low-rank change."""

    path: Location
    config: AdapterConfig
    parts: Parts


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
