"""branch.json for a model that another training stack has trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.model import model_fingerprint, resolve_model

BRANCH_FILE = "branch.json"
_CONFIGS = ("config.json", "adapter_config.json")


def write_branch(
    directory: str | Path,
    num_target_tokens: int,
    *,
    start: str | Path,
    datasets: Sequence[str] = (),
    num_examples: int = 0,
    steps: int = 0,
    seed: int = 0,
) -> BranchManifest:
    """Writes branch.json into a trained model's directory, so that merges weigh it by its tokens.

        write_branch("branch-0", 120_000, start="BASE")
        write_branch("branch-1", 90_000, start="BASE")
        merge_models(["branch-0", "branch-1"], "tokens", out="merged")

    An earlier branch.json is replaced.

    Args:
        directory: a model's or LoRA adapter's directory.
        num_target_tokens: tokens in the loss over the whole training, epochs counted.
        start: directory or hub id of the model that training started from. A merge by tokens
            refuses branches of different starts.
        datasets: names of the datasets that the branch has seen.
        num_examples: examples seen, epochs counted; merges by samples need it.
        steps: optimizer steps.
        seed: seed of the training.

    Returns:
        The manifest that was written.

    Raises:
        InputError: the directory holds no model, the start is none, or a count is not possible.
    """
    folder = Path(directory)
    if not is_model_folder(folder):
        raise InputError(f"{folder}: is not a model's directory: it has no {' or '.join(_CONFIGS)}")
    if num_target_tokens < 1:
        raise InputError(f"num_target_tokens: must be at least 1, got {num_target_tokens}")
    if num_examples < 0 or steps < 0:
        raise InputError(
            f"num_examples and steps: must be at least 0, got {num_examples} and {steps}"
        )
    fingerprint = model_fingerprint(resolve_model(str(start)))
    return put_branch(
        folder,
        fingerprint,
        datasets=tuple(datasets),
        num_examples=num_examples,
        num_target_tokens=num_target_tokens,
        num_tokens=num_target_tokens,
        steps=steps,
        seed=seed,
    )


def put_branch(folder: Path, start_fingerprint: str, **counts: Any) -> BranchManifest:
    """Writes branch.json; the counts are fields of ``BranchManifest``."""
    manifest = BranchManifest(
        branch=folder.resolve().name,
        arm="merit",
        group=0,
        base_fingerprint=start_fingerprint,
        start_fingerprint=start_fingerprint,
        **counts,
    )
    write_manifest(manifest, folder / BRANCH_FILE)
    return manifest


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter."""
    return any((folder / name).is_file() for name in _CONFIGS)
