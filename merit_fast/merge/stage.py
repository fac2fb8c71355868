"""The merge stage: branches and weights in, one checkpoint out."""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from merit_fast.errors import InputError
from merit_fast.manifest import STAGE_FILE, BranchManifest, output_directory, read_manifest, stage_manifest, write_text
from merit_fast.merge.checkpoint import INDEX_FILE, read_checkpoint
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.plan import plan_merge
from merit_fast.merge.stream import write_shard
from merit_fast.model import model_fingerprint
from merit_fast.progress import Progress

# What a model directory holds beside its weights; whatever of it the first branch has is copied.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def merge_branches(
    models: Sequence[Path], weights: Sequence[float], config: MergeConfig, directory: Path, progress: Progress
) -> None:
    """Writes sum_k weights[k] * models[k] into ``directory``: fp64 sums in order, rounded once to the inputs' dtype.

    Everything is checked from the headers before a byte is written. A shard that an interrupted run finished is kept.
    The index is written last.

    Args:
        models: K checkpoint directories with the same tensors.
        weights: K floats that sum to 1.
        config: engine options.
        directory: an output directory still under its temporary name.
        progress: where progress goes.

    Raises:
        InputError, MeritFastError: see ``read_checkpoint``, ``plan_merge`` and ``write_shard``.
    """
    plan = plan_merge([read_checkpoint(model) for model in models])
    if free := _too_little_space(directory, plan.num_bytes):
        raise InputError(f"{directory}: needs {plan.num_bytes} bytes, the disk has {free}")
    with progress.task(f"merge {directory.stem}", plan.num_elements, "parameters") as task:
        for shard in plan.shards:
            final = directory / shard.file
            if final.exists():
                task.advance(sum(segment.num_elements for segment in shard.segments))
                continue
            temporary = directory / f"{shard.file}.part"
            write_shard(shard, weights, config, temporary, lambda count: task.advance(count))
            descriptor = os.open(temporary, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            os.replace(temporary, final)
    for name in COMPANIONS:
        if (models[0] / name).exists():
            shutil.copyfile(models[0] / name, directory / name)
    if plan.index is not None:
        write_text(directory / INDEX_FILE, plan.index)


def merge_models(
    models: Sequence[tuple[Path, float | None]], out: Path, config: MergeConfig, progress: Progress
) -> list[float]:
    """Averages any checkpoints into the directory ``out``; returns the normalised weights.

    Args:
        models: K directories, each with its weight or None; all None: ``config.weights`` decides.
        out: absent, or an earlier output of merit-fast, which is replaced when the new one is whole.

    Raises:
        InputError: weights for some models only; ``out`` is an input or not ours; see ``merge_branches``.
    """
    paths = [path for path, _ in models]
    given = tuple(weight for _, weight in models if weight is not None)
    if given and len(given) < len(models):
        raise InputError("command line: --model: give a weight to every model or to none")
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path}: is not a directory")
        if path.resolve() == out.resolve():
            raise InputError(f"{out}: the output must not be one of the inputs")
    if out.exists() and not (out / STAGE_FILE).exists():
        raise InputError(f"{out}: exists and is not an output of merit-fast; remove it or choose another directory")
    config = dataclasses.replace(config, weights=given or config.weights)
    weights = resolve_weights(paths, config)
    inputs = {str(path): model_fingerprint(path) for path in paths}
    with output_directory(out, stage_manifest("merge", config, inputs)) as directory:
        merge_branches(paths, weights, config, directory, progress)
    return weights


def resolve_weights(models: Sequence[Path], config: MergeConfig) -> list[float]:
    """One weight per model, normalised to sum 1 in float64: from each branch.json's counts, uniform, or as listed.

    Raises:
        InputError: a branch.json is missing or starts from another base, a count is zero, the list's length is wrong.
    """
    if config.weights == "uniform":
        raw = [1.0] * len(models)
    elif isinstance(config.weights, tuple):
        if len(config.weights) != len(models):
            raise InputError(f"merge.weights: must list {len(models)} numbers, got {len(config.weights)}")
        raw = list(config.weights)
    else:
        raw = [float(count) for count in _branch_counts(models, config.weights)]
    total = sum(raw)
    return [weight / total for weight in raw]


def _branch_counts(models: Sequence[Path], unit: str) -> list[int]:
    branches = []
    for model in models:
        if not (model / "branch.json").exists():
            raise InputError(
                f"{model}: has no branch.json to take its {unit} from; give weights as a list, or merge.weights=uniform"
            )
        branches.append(read_manifest(BranchManifest, model / "branch.json"))
    for model, branch in zip(models, branches, strict=True):
        if branch.base_fingerprint != branches[0].base_fingerprint:
            raise InputError(
                f"{model / 'branch.json'}: base_fingerprint: must be {branches[0].base_fingerprint} as in {models[0]}, "
                f"got {branch.base_fingerprint}"
            )
    counts = [b.num_target_tokens if unit == "tokens" else b.num_examples for b in branches]
    for model, count in zip(models, counts, strict=True):
        if count <= 0:
            raise InputError(f"{model / 'branch.json'}: {unit} must be positive to weigh the merge, got {count}")
    return counts


def _too_little_space(directory: Path, needed: int) -> int | None:
    """The free bytes if they do not suffice."""
    existing = sum(file.stat().st_size for file in directory.glob("*.safetensors*"))
    free = shutil.disk_usage(directory).free + existing
    return free if free < needed else None
