"""The merge stage: checkpoints and weights in, one checkpoint out."""

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merit_fast.errors import InputError
from merit_fast.manifest import (
    STAGE_FILE,
    BranchManifest,
    output_directory,
    read_manifest,
    stage_manifest,
    write_text,
)
from merit_fast.merge.checkpoint import INDEX_FILE, read_checkpoint
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.geometry import Array, write_geometry, write_shard_grams
from merit_fast.merge.methods import Combination, combine
from merit_fast.merge.plan import Plan, plan_merge
from merit_fast.merge.stream import gram_shard, write_shard
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
# merge.dtype -> (name in safetensors, name in config.json)
_DTYPES = {"bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16"), "fp32": ("F32", "float32")}


def merge_branches(
    models: Sequence[Path],
    weights: Sequence[float],
    config: MergeConfig,
    directory: Path,
    progress: Progress,
    base: Path | None = None,
) -> None:
    """Writes the combination of ``models`` into ``directory``: fp64 sums in order, rounded once to the output's dtype.

    Everything is checked from the headers before a byte is written. A shard that an interrupted run finished is kept.
    The index is written last.

    Args:
        models: K checkpoint directories with the same tensors.
        weights: K floats, used as they are.
        config: method and engine options.
        directory: an output directory still under its temporary name.
        progress: where progress goes.
        base: the checkpoint they all started from, for methods that need it.

    Raises:
        InputError, MeritFastError: see ``combine``, ``read_checkpoint``, ``plan_merge`` and ``write_shard``.
    """
    combination = combine(models, weights, base, config)
    plan = _plan(combination, config, progress)
    if free := _too_little_space(directory, plan.num_bytes):
        raise InputError(f"{directory}: needs {plan.num_bytes} bytes, the disk has {free}")
    with progress.task(f"merge {directory.stem}", plan.num_elements, "parameters") as task:
        for shard in plan.shards:
            final = directory / shard.file
            if final.exists():
                task.advance(sum(segment.num_elements for segment in shard.segments))
                continue
            temporary = directory / f"{shard.file}.part"
            grams = write_shard(shard, config, temporary, lambda count: task.advance(count))
            if config.geometry:
                write_shard_grams(directory, shard, grams)
            descriptor = os.open(temporary, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            os.replace(temporary, final)
    if config.geometry:
        write_geometry(directory, plan.shards, models, combination.coefficients[: len(models)])
    for name in COMPANIONS:
        if (models[0] / name).exists():
            shutil.copyfile(models[0] / name, directory / name)
    if config.dtype and (directory / "config.json").exists():
        _set_dtype(directory / "config.json", _DTYPES[config.dtype][1])
    if plan.index is not None:
        write_text(directory / INDEX_FILE, plan.index)


def merge_models(
    models: Sequence[tuple[Path, float | None]],
    out: Path,
    config: MergeConfig,
    progress: Progress,
    base: Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Combines any checkpoints into the directory ``out``.

    Args:
        models: K directories, each with its weight or None; all None: ``config.weights`` decides.
        out: absent, or an earlier output of merit-fast, which is replaced when the new one is whole.
        config, progress, base: as in ``merge_branches``.
        dry_run: read headers only and write nothing.

    Returns:
        JSON-ready: weights and coefficients used; bytes in and out, the memory of the engine's buffers.

    Raises:
        InputError: weights for some models only; ``out`` is an input or not ours; see ``merge_branches``.
    """
    paths = [path for path, _ in models]
    given = tuple(weight for _, weight in models if weight is not None)
    if given and len(given) < len(models):
        raise InputError(f"merge: give a weight to every model or to none, got {len(given)} for {len(models)} models")
    inputs = [*paths, *([base] if base else [])]
    for path in inputs:
        if not path.is_dir():
            raise InputError(f"{path}: is not a directory")
        if path.resolve() == out.resolve():
            raise InputError(f"{out}: the output must not be one of the inputs")
    if out.exists() and not (out / STAGE_FILE).exists():
        raise InputError(f"{out}: exists and is not an output of merit-fast; remove it or choose another directory")
    config = dataclasses.replace(config, weights=given or config.weights)
    weights = resolve_weights(paths, config)
    combination = combine(paths, weights, base, config)
    summary = _summary(out, weights, combination, config)
    if not dry_run:
        fingerprints = {str(path): model_fingerprint(path) for path in inputs}
        with output_directory(out, stage_manifest("merge", config, fingerprints)) as directory:
            merge_branches(paths, weights, config, directory, progress, base)
    return summary


def resolve_weights(models: Sequence[Path], config: MergeConfig) -> list[float]:
    """One weight per model in float64: from each branch.json's counts, uniform, or as listed; of sum 1 if normalised.

    Raises:
        InputError: a branch.json is missing or starts from another base, a count is zero, the list's length is wrong.
    """
    if config.weights == "uniform" or config.takes_gram:
        raw = [1.0] * len(models)
    elif isinstance(config.weights, tuple):
        if len(config.weights) != len(models):
            raise InputError(f"merge.weights: must list {len(models)} numbers, got {len(config.weights)}")
        raw = list(config.weights)
    else:
        raw = [float(count) for count in _branch_counts(models, config.weights)]
        return [count / sum(raw) for count in raw]  # counts mean nothing unless normalised
    total = sum(raw) if config.normalize else 1.0
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


def _plan(combination: Combination, config: MergeConfig, progress: Progress) -> Plan:
    """The plan with every tensor's coefficients; methods that need Gram matrices read all inputs once for them."""
    checkpoints = [read_checkpoint(path) for path in combination.paths]
    dtype = _DTYPES[config.dtype][0] if config.dtype else None
    from_gram = combination.from_gram
    if from_gram is None:
        return plan_merge(checkpoints, dtype, lambda name: combination.coefficients)
    grams: dict[str, Array] = {}
    plan = plan_merge(checkpoints, dtype)
    with progress.task("compare models", plan.num_elements, "parameters") as task:
        for shard in plan.shards:
            grams |= gram_shard(shard, config, combination.gram_from_base, lambda count: task.advance(count))
    for name, gram in grams.items():
        if not np.isfinite(gram).all():
            raise InputError(f"{combination.paths[0]}: {name}: must be finite here and in the other models")
    return plan_merge(checkpoints, dtype, lambda name: from_gram(grams[name]))


def _summary(out: Path, weights: Sequence[float], combination: Combination, config: MergeConfig) -> dict[str, Any]:
    checkpoints = [read_checkpoint(path) for path in combination.paths]
    plan = plan_merge(checkpoints, _DTYPES[config.dtype][0] if config.dtype else None)
    passes = 1 if combination.from_gram is None else 2
    coefficients = combination.coefficients if combination.from_gram is None else (None,) * len(combination.paths)
    return {
        "merged": str(out),
        "weights": list(weights),
        "coefficients": [[str(p), c] for p, c in zip(combination.paths, coefficients, strict=False)],
        "shards": len(plan.shards),
        "segments": sum(len(shard.segments) + len(shard.copies) for shard in plan.shards),
        "parameters": plan.num_elements,
        "bytes_in": passes * sum(entry.num_bytes for c in checkpoints for entry in c.tensors.values()),
        "bytes_out": plan.num_bytes,
        "buffer_bytes": config.threads * (len(combination.paths) + 1) * config.chunk_kib * 1024,
    }


def _set_dtype(config_file: Path, dtype: str) -> None:
    """Makes config.json agree with the tensors, under whichever of its two names the key is there."""
    values = json.loads(config_file.read_text(encoding="utf-8"))
    for key in [key for key in ("dtype", "torch_dtype") if key in values] or ["dtype"]:
        values[key] = dtype
    write_text(config_file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _too_little_space(directory: Path, needed: int) -> int | None:
    """The free bytes if they do not suffice."""
    existing = sum(file.stat().st_size for file in directory.glob("*.safetensors*"))
    free = shutil.disk_usage(directory).free + existing
    return free if free < needed else None
