"""The merge stage: checkpoints and weights in, one checkpoint out."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.directories import begin_directory, finish_directory
from merit_fast.manifests.io import (
    STAGE_FILE,
    StageManifest,
    fingerprint,
    stage_manifest,
    write_manifest,
)
from merit_fast.merge.combine.weights import resolve_weights
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.layout import header_bytes
from merit_fast.merge.engine.plan import plan_merge
from merit_fast.merge.engine.prepare import Inputs, buffer_bytes, fit_memory, make_plan, read_inputs
from merit_fast.merge.read.decoded import is_float
from merit_fast.merge.read.files import is_directory
from merit_fast.merge.read.remote import Location, RemotePath, as_location, input_fingerprint
from merit_fast.merge.read.slices import Slice, describe_slices, write_depth
from merit_fast.merge.write.shards import (
    Share,
    all_written,
    finish_output,
    free_bytes,
    only_finisher,
    write_shards,
)
from merit_fast.merge.write.upload import Upload, check_output, spool_directory
from merit_fast.progress import Progress


def merge_branches(
    models: Sequence[Location],
    weights: Sequence[float],
    config: MergeConfig,
    directory: Path,
    progress: Progress,
    base: Location | None = None,
) -> None:
    """Writes the combination of ``models`` into ``directory``: fp64 sums in order, rounded once to the output's dtype.

    Everything is checked from the headers before a byte is written. A shard that an interrupted run finished is kept.
    The index is written last.

    Args:
        models: K checkpoint directories with the same tensors, or LoRA adapters on the base.
        weights: K floats, used as they are.
        config: method and engine options.
        directory: an output directory still under its temporary name.
        progress: where progress goes.
        base: the checkpoint they all started from, for methods that need it.

    Raises:
        InputError, MeritFastError: see ``read_inputs``, ``make_plan`` and ``write_shards``.
    """
    inputs = read_inputs(models, weights, base, config)
    config = replace(config, chunk_kib=fit_memory(inputs, config))
    plan = make_plan(inputs, config, progress)
    write_shards(plan, config, directory, progress)
    finish_output(plan, inputs, models, config, directory)


def merge_models(
    models: Sequence[tuple[str | Location, float | None]],
    out: str | Location,
    config: MergeConfig,
    progress: Progress,
    base: str | Location | None = None,
    dry_run: bool = False,
    share: Share = (1, 1),
    slices: Sequence[Slice] = (),
    companions: Location | None = None,
    records: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Combines any checkpoints into the directory ``out``. Directories may be fsspec URLs, as in ``as_location``.

    Args:
        models: K directories, each with its weight or None; all None: ``config.weights`` decides.
        out: absent, or an earlier output of merit-fast, which is replaced when the new one is whole.
        config, progress, base: as in ``merge_branches``.
        dry_run: read headers only and write nothing.
        share: (i, n): of the output's files write every n-th from the i-th on; the process that finds all of them
            there finishes the output.
        slices, companions: as in ``read_inputs``.
        records: names and texts of files to lie beside the weights.

    Returns:
        JSON-ready: weights and coefficients used; bytes in and out, the memory of the engine's buffers.

    Raises:
        InputError: weights for some models only; ``out`` is an input or not ours; a share that is none; see
            ``merge_branches``.
    """
    paths, out = [as_location(path) for path, _ in models], as_location(out)
    base = as_location(base) if base else None
    given = tuple(weight for _, weight in models if weight is not None)
    if given and len(given) < len(models):
        raise InputError(
            f"merge: give a weight to every model or to none, got {len(given)} for {len(models)} models"
        )
    if not 1 <= share[0] <= share[1]:
        raise InputError(f"merge: share: must be 1 to n of n, got {share[0]}/{share[1]}")
    check_places([*paths, *([base] if base else [])], out)
    config = replace(config, weights=given or config.weights)
    weights = resolve_weights(paths, config)
    inputs = read_inputs(paths, weights, base, config, slices, companions)
    config = replace(config, chunk_kib=fit_memory(inputs, config))
    summary = _summary(out, weights, inputs, config)
    if dry_run:
        return summary
    fingerprints = {
        str(path): input_fingerprint(path) for path in (*paths, *([base] if base else []))
    }
    if slices:
        fingerprints["slices"] = describe_slices(slices)
    records = dict(records or {})
    fingerprints |= {name: fingerprint(text) for name, text in records.items()}
    manifest = stage_manifest("merge", same_bytes(config), fingerprints)
    if isinstance(out, RemotePath):
        finished = _merge_into_store(
            out, manifest, inputs, paths, config, progress, share, slices, records
        )
        return summary | {"finished": finished}
    directory = begin_directory(out, manifest.fingerprint)
    plan = make_plan(inputs, config, progress)
    write_shards(plan, config, directory, progress, share)
    if not all_written(plan, directory):
        return summary | {"finished": False}
    with only_finisher(directory, out) as mine:
        if mine:
            finish_output(plan, inputs, paths, config, directory)
            if slices:
                write_depth(directory, slices)
            _write_records(directory, records)
            finish_directory(directory, out, manifest, config.fsync)
    return summary


def _merge_into_store(
    out: RemotePath,
    manifest: StageManifest,
    inputs: Inputs,
    branches: Sequence[Location],
    config: MergeConfig,
    progress: Progress,
    share: Share,
    slices: Sequence[Slice],
    records: Mapping[str, str],
) -> bool:
    """Makes the output file by file and sends it; False while other processes' files are missing."""
    upload = Upload(out, {shard.file: shard.num_bytes for shard in plan_merge(inputs.files).shards})
    config = replace(config, fsync=False)  # the disk is only passed through
    if not upload.begin(manifest.fingerprint):
        plan = make_plan(inputs, config, progress)
        with spool_directory(out.name) as spool:
            write_shards(plan, config, spool, progress, share, upload)
            if not upload.all_written():
                return False
            if upload.fetch_parts(spool):
                finish_output(plan, inputs, branches, config, spool, out)
                if slices:
                    write_depth(spool, slices)
                _write_records(spool, records)
                write_manifest(manifest, spool / STAGE_FILE)
                upload.finish(spool)
    upload.sweep()
    return True


def same_bytes(config: MergeConfig) -> MergeConfig:
    """The config without what changes no byte of the output."""
    same = replace(config, threads=1, chunk_kib=512, max_memory=None, fsync=True)
    if config.is_tuned:
        return same
    return replace(same, ridge=MergeConfig.ridge, tune_rows=MergeConfig.tune_rows)


def _write_records(directory: Path, records: Mapping[str, str]) -> None:
    for name, text in records.items():
        write_text(directory / name, text)


def check_places(inputs: Sequence[Location], out: Location) -> None:
    """Raises InputError if an input is no directory, or the output would lie in its way or over what is not ours."""
    for path in inputs:
        if not is_directory(path):
            raise InputError(f"{path}: is not a directory")
        if path.resolve() == out.resolve():
            raise InputError(f"{out}: the output must not be one of the inputs")
        if out.resolve() in path.resolve().parents:
            raise InputError(f"{out}: the output must not hold the input {path}")
    if isinstance(out, RemotePath):
        check_output(out)
    elif out.exists() and not (out / STAGE_FILE).exists():
        raise InputError(
            f"{out}: exists and is not an output of merit-fast; remove it or choose another directory"
        )


def _summary(
    out: Location, weights: Sequence[float], inputs: Inputs, config: MergeConfig
) -> dict[str, Any]:
    tensors = [tensor for file in inputs.files for tensor in file.tensors]
    passes = {
        "slerp": 2,
        "multislerp": 2,
        "model_stock": 2,
        "ties": 3,
        "breadcrumbs": 3,
        "breadcrumbs_ties": 3,
    }
    return {
        "merged": str(out),
        "method": config.method,
        "weights": list(weights),
        "coefficients": _coefficients(inputs),
        "shards": len(inputs.files),
        "tensors": len(tensors),
        "parameters": sum(tensor.num_elements for tensor in tensors),
        "bytes_in": passes.get(config.method, 5 if config.method == "sce" else 1)
        * inputs.bytes_read,
        "bytes_out": sum(
            len(header_bytes(file)) + sum(t.num_bytes for t in file.tensors)
            for file in inputs.files
        ),
        "buffer_bytes": buffer_bytes(inputs, config),
        "free_bytes": free_bytes(out if isinstance(out, Path) else Path(tempfile.gettempdir())),
        "finished": True,
    }


def _coefficients(inputs: Inputs) -> list[tuple[str, float | None]]:
    """Each input's coefficient, None where it differs from tensor to tensor or there is none."""
    combination = inputs.combination
    rules = set()
    if combination.from_gram is None:
        floats = [
            tensor for file in inputs.files for tensor in file.tensors if is_float(tensor.inputs[0])
        ]
        rules = {combination.rule(replace(tensor.inputs[0], name=tensor.name)) for tensor in floats}
    only = rules.pop() if len(rules) == 1 else None
    given: tuple[float | None, ...] = only if isinstance(only, tuple) else ()
    paths = combination.paths
    return [
        (str(path), c)
        for path, c in zip(paths, (*given, *[None] * (len(paths) - len(given))), strict=True)
    ]
