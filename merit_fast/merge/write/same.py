"""What two merges must share to give the same bytes."""

from dataclasses import replace

from merit_fast.merge.config import MergeConfig
from merit_fast.merge.registry import method_source


def same_bytes(config: MergeConfig) -> MergeConfig:
    """The config with defaults for every option that changes no byte of the output."""
    same = replace(config, threads=1, chunk_kib=512, max_memory=None, fsync=True)
    if config.is_tuned:
        return same
    return replace(same, ridge=MergeConfig.ridge, tune_rows=MergeConfig.tune_rows)


def method_fingerprint(config: MergeConfig) -> dict[str, str]:
    """Digest of a registered method's code, an input of the merge; {} for built-in methods."""
    source = method_source(config.method_entry)
    return {} if source is None else {"method": source}
