"""The merge stage: checkpoints and weights in; one checkpoint, or one loaded model, out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_fast.errors import InputError
from merit_fast.manifests.kept import remove_records
from merit_fast.merge.combine.weights import (
    Weights,
    resolve_weights,
    settle_weights,
    weights_reason,
)
from merit_fast.merge.config import FP8_BLOCK, MergeConfig, config_of
from merit_fast.merge.engine.quantise.rounding import read_rounding
from merit_fast.merge.option_names import options_named
from merit_fast.merge.prepared import prepare_merge
from merit_fast.merge.read.adapters.folder import is_adapter
from merit_fast.merge.read.folders.several import several_models
from merit_fast.merge.read.remote import Location, RemotePath, as_location
from merit_fast.merge.read.slices import Slice
from merit_fast.merge.write.answers import answer_notes
from merit_fast.merge.write.card import RunFacts
from merit_fast.merge.write.places import check_paths
from merit_fast.merge.write.shards import Share
from merit_fast.progress import Progress, SilentProgress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from merit_fast.merge.engine.modules import Module
    from merit_fast.merge.folders.several import FolderMerge

_OF_FILES = ("form", "shard_size", "stats", "checksum", "fsync", "chat_template")


@options_named("python")
def merge_models(  # noqa: PLR0913
    models: Sequence[Location | str],
    /,
    weights: Weights | None = None,
    base: Location | str | None = None,
    *,
    out: Location | str,
    config: MergeConfig | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    share: Share = (1, 1),
    slices: Sequence[Slice] = (),
    modules: Sequence["Module"] = (),
    companions: Location | None = None,
    records: Mapping[str, str] | None = None,
    run: RunFacts | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Merges checkpoints into the directory ``out``.

        merge_models(["a", "b"], [3, 1], base="start", out="merged", method="ties", density=0.2)

    Sums are taken in float64 in order and rounded once to the output's dtype. Everything is checked
    from the headers before a byte is written. The same call resumes an interrupted merge.

    Args:
        models: K checkpoint directories or fsspec URLs, or LoRA adapters on the base.
        weights: K numbers, divided by their sum unless ``normalize=False``; "uniform"; "tokens" or
            "samples" from each branch.json; "auto": "tokens" where every model has a branch.json,
            "uniform" where none has. None: ``config.weights``, by default "auto".
        base: theta_0's directory, for methods that need it.
        out: absent, or an earlier output of merit-fast, which is replaced when the new one is
            whole.
        config: method and engine options; None: made of ``options``.
        progress: receives progress; None: nobody does.
        dry_run: read headers only and write nothing.
        share: (i, n): write every n-th output file from the i-th on. The process that finds all of
            them finishes the output.
        slices: as in ``read_inputs``.
        modules: as in ``prepare_merge``.
        companions: as in ``read_inputs``.
        records: names and texts of files to write next to the weights.
        run: the run whose branches the models are, for the model card.
        options: fields of ``MergeConfig``, in place of ``config``.

    Returns:
        JSON-ready: weights and coefficients, and why they are so; the dtype and its reason; bytes
        in and out; memory of the engine's buffers.

    Raises:
        InputError: an option or a directory breaks a rule; ``out`` is an input or not ours.
        MeritFastError: reading or writing failed.
    """
    config = config_of("merge_models", config, options, weights)
    progress = progress or SilentProgress()
    paths = [as_location(path) for path in models]
    start = as_location(base) if base else None
    out = as_location(out)
    if not 1 <= share[0] <= share[1]:
        raise InputError(f"merge: share: must be 1 to n of n, got {share[0]}/{share[1]}")
    check_paths([*paths, *([start] if start else [])], out)
    reason = weights_reason(paths, config)
    config = settle_weights(paths, config)
    numbers = resolve_weights(paths, config)
    if start is None and not (slices or modules) and all(is_adapter(path) for path in paths):
        from merit_fast.merge.lora.join import JoinedAdapters

        joined = JoinedAdapters(paths, numbers, config)
        if not dry_run:
            joined.write(out, progress)
        return joined.summary(out) | {"weights_reason": reason}
    if config.rank is not None:
        raise InputError("merge.rank: goes with adapters without a base")
    several = None if slices or modules else several_models(paths[0])
    if several is not None:
        from merit_fast.merge.folders.several import prepare_folders

        folders = prepare_folders(several, paths, numbers, start, config)
        facts = _merge_folders(folders, out, progress, dry_run, share, records)
        return facts | {"weights_reason": reason}
    merge = prepare_merge(paths, numbers, start, config, slices, companions, run, modules)
    template = merge.inputs.tokenizer if merge.inputs.chat_template is None else None
    for note in answer_notes(paths, merge.inputs.companions, template):
        progress.note(note)
    summary = merge.summary(out) | {"weights_reason": reason}
    if dry_run:
        return summary
    if isinstance(out, RemotePath):
        finished = merge.upload(out, progress, share, records)
    else:
        finished = merge.write(out, progress, share, records)
    return summary | {"finished": finished} | read_rounding(out)


def _merge_folders(
    folders: "FolderMerge",
    out: Location,
    progress: Progress,
    dry_run: bool,
    share: Share,
    records: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Merges folders of several models, which have fewer options than one model."""
    listing = folders.giver.path / folders.giver.listing
    if not isinstance(out, Path):
        raise InputError(f"{out}: must be local, as {listing} makes a folder of several models")
    if share != (1, 1) or records:
        raise InputError(f"merge: share and records go with one model, {listing} lists several")
    summary = folders.summary(out)
    if not dry_run:
        folders.write(out, progress)
    return summary


@options_named("python")
def merge_trajectory(
    pattern: str,
    /,
    *,
    out: Location | str,
    schedule: str = "uniform",
    last: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Averages the checkpoints of one run, weighed along its steps, into the directory ``out``.

        merge_trajectory("run/ckpt-*", schedule="minus-sqrt", last=8, out="merged")

    Args:
        pattern: as in ``read_trajectory``, which also has the formulas.
        out: as in ``merge_models``.
        schedule: uniform, linear, minus-sqrt, ema:BETA, or a file of names and weights.
        last: only so many checkpoints, the latest.
        options: as in ``merge_models``.

    Returns:
        the summary of ``merge_models``, with "trajectory": [step, weight, path] of each.

    Raises:
        InputError, MeritFastError: as ``read_trajectory`` and ``merge_models``.
    """
    from merit_fast.merge.trajectory import read_trajectory

    trajectory = read_trajectory(pattern, schedule, last)
    summary = merge_models(trajectory.paths, trajectory.weights, out=out, **options)
    rows = zip(trajectory.steps, trajectory.weights, map(str, trajectory.paths), strict=True)
    return summary | {"schedule": schedule, "trajectory": [list(row) for row in rows]}


@options_named("python")
def load_merged(
    models: Sequence[Location | str],
    /,
    weights: Weights | None = None,
    base: Location | str | None = None,
    *,
    config: MergeConfig | None = None,
    device: "torch.device | str" = "cpu",
    **options: Any,
) -> "PreTrainedModel":
    """Loads the transformers model that ``merge_models`` would write, merged while it is loaded.

        load_merged(["a", "b"], [3, 1], base="start", method="ties", density=0.2)

    The engine makes each tensor when transformers asks for it, straight into its memory: nothing is
    written to disk and no second copy of the model exists. The engine's buffers (``max_memory``)
    come on top; on CUDA also two pinned buffers of the largest tensor's size, one filled while the
    other is copied. That path was never run on a GPU; its order of steps is tested without one. The
    CPU computes the tensors, so they have the bits of the file merge on every device.

    Args:
        models: as in ``merge_models``. The first checkpoint, else the base, gives config.json and
            so the class.
        weights: as in ``merge_models``.
        base: as in ``merge_models``.
        config: as in ``merge_models``, without options of output files.
        device: the model's device. Any other than "cpu" needs accelerate.

    Returns:
        The model in evaluation mode, tied weights tied, float tensors in ``dtype``, by default the
        checkpoints' own.

    Raises:
        InputError: an option is unknown (the nearest is named) or wrong, a directory breaks a rule,
            tensors disagree, a value is not finite, or the model's class lacks the checkpoints'
            tensors.
    """
    from merit_fast.merge.in_memory.loading import checked_device

    for name in _OF_FILES:
        if name in options:
            raise InputError(f"load_merged: {name}: concerns an output's files, must be absent")
    config = config_of("load_merged", config, options, weights)
    paths = [_expanded(path) for path in models]
    start = None if base is None else _expanded(base)
    if config.dtype == FP8_BLOCK:
        raise InputError(f"load_merged: dtype: {FP8_BLOCK} concerns an output's files")
    target = checked_device(device)
    if (several := several_models(paths[0])) is not None:
        listing = paths[0] / several.listing
        raise InputError(f"{listing}: lists several models; merge them into files")
    weights = resolve_weights(paths, config)
    return prepare_merge(paths, weights, start, config, to_memory=True).load(target)


def merge_branches(
    models: Sequence[Location],
    weights: Sequence[float],
    base: Location | None,
    directory: Path,
    config: MergeConfig,
    progress: Progress,
    run: RunFacts | None = None,
    keep_records: bool = False,
) -> None:
    """Merges ``models`` into an output directory that is still under its temporary name.

    Args:
        models: as in ``merge_models``.
        base: as in ``merge_models``.
        weights: K numbers, used as they are.
        directory: it exists; shards that an interrupted run finished are kept.
        config: method and engine options.
        progress: receives progress.
        run: the run whose branches the models are, for the model card.
        keep_records: leave the hashes of the weight files next to them for ``output_directory``.

    Raises:
        InputError, MeritFastError: as ``merge_models``.
    """
    prepare_merge(models, weights, base, config, run=run).write_into(directory, progress)
    if not keep_records:
        remove_records(directory)


def _expanded(path: Location | str) -> Location:
    location = as_location(path)
    return location.expanduser() if isinstance(location, Path) else location
