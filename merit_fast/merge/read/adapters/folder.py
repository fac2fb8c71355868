"""Whether a folder holds an adapter; imports no reader of one."""

from merit_fast.merge.read.remote import Location

ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(path: Location) -> bool:
    """Whether a directory holds an adapter and no model."""
    return (path / ADAPTER_CONFIG).exists() and not (path / "config.json").exists()
