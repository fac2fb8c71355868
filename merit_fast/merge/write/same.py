"""What two merges must share to give the same bytes."""

from typing import TYPE_CHECKING

from merit_fast.errors import InputError
from merit_fast.manifests.io import StageManifest, fingerprint
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.read.slices import describe_slices
from merit_fast.merge.registry import method_source
from merit_fast.options.parser import to_plain
from merit_fast.records import replace

if TYPE_CHECKING:
    from merit_fast.merge.engine.modules import Module


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


def check_unchanged(before: StageManifest, now: StageManifest) -> None:
    """Refuses inputs that changed between two manifests of one merge.

    Raises:
        InputError: names them.
    """
    pairs = before.inputs.items()
    changed = [name for name, digest in pairs if now.inputs.get(name) != digest]
    if changed:
        names = ", ".join(changed)
        raise InputError(f"{names}: changed while the merge read it; run the command again")


def module_digest(module: "Module") -> str:
    """Digest of what decides a tower: models in order, weights, numbers and slices."""
    facts = [*map(str, (*module.models, module.base)), *module.weights]
    return fingerprint([facts, to_plain(same_bytes(module.config)), describe_slices(module.slices)])
