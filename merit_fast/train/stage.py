"""The train stage: full fine-tuning of one branch, resumable to the same bytes."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merit_fast.data import Batch, DataConfig, Dataset
from merit_fast.data.dataset import ChainedExamples
from merit_fast.errors import InputError, MeritFastError
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.model import (
    freeze_parameters,
    load_model,
    no_loading_bar,
    peak_memory_bytes,
    reads_trees,
    reset_peak_memory,
)
from merit_fast.patch.model import Patch, patch_model
from merit_fast.progress import Progress
from merit_fast.train.companions import Companions
from merit_fast.train.config import TrainConfig
from merit_fast.train.loss import batch_loss, choose_attention, require_packing, require_text
from merit_fast.train.optimizer import MasterAdamW
from merit_fast.train.resume import Position, read_checkpoint, remove_checkpoint, write_checkpoint
from merit_fast.train.schedule import learning_rate, num_steps
from merit_fast.train.steps import Schedule

_EXPANDED = (
    "train: this model cannot read the answers of a rewritten conversation as branches of one "
    "text; each answer is a text of its own, with more tokens"
)


@dataclass(frozen=True)
class BranchJob:
    """One branch to train: its name, its place in the run, its rows and its start."""

    branch: str
    arm: str
    group: int
    datasets: tuple[Dataset, ...]
    start_path: str
    base_fingerprint: str
    start_fingerprint: str
    steps: int | None = None  # optimizer steps; None: those of the recipe's epochs
    row_length: int | None = None  # tokens of the longest packed row; None: no limit
    data: DataConfig = DataConfig()  # how the rows became tokens


def train_branch(
    job: BranchJob,
    config: TrainConfig,
    directory: Path,
    progress: Progress,
    noted: set[str] | None = None,
) -> BranchManifest:
    """Fine-tunes the base on the job's datasets; writes a model directory with branch.json.

    A step's examples, learning rate and random state depend only on (seed, step). A killed run
    therefore resumes from its last checkpoint in ``directory`` and ends with the same bytes.

    Args:
        job: the branch and its rows.
        config: the recipe.
        directory: an output directory that still has its temporary name.
        progress: display of the run.
        noted: notes that this run has shown already; a new note is shown and added. None: none yet.

    Returns:
        The manifest of branch.json. Wall time and peak memory go to timing.json, which is no part
        of the result.

    Raises:
        InputError: the job has no example, the start has no chat template, the model cannot take
            packed rows, or ``config.freeze`` does not fit its parameters.
        MeritFastError: the loss is not finite.
    """
    examples = ChainedExamples(job.datasets)
    if not len(examples):
        raise InputError(f"{job.branch}: has no example to train on")
    companions = Companions(job.start_path, job.data)
    reset_peak_memory()
    start = time.perf_counter()
    model = load_model(job.start_path, config.dtype).train()
    freeze_parameters(model, config.freeze)
    patch = patch_model(model, config.kernels)
    noted = set() if noted is None else noted
    _note_once(progress, str(patch), noted)
    expands = _expands_trees(model, examples)
    if expands:
        _note_once(progress, _EXPANDED, noted)
    if expands or not len(examples.tree_indices):
        choose_attention(model)
    if config.packing:
        require_text(job.datasets)
        require_packing(model, examples.shortest(8))
    optimizer = MasterAdamW(model, config, "eager" if config.kernels == "eager" else None)
    position, earlier_s = _resume(directory, optimizer)
    steps = job.steps or num_steps(len(examples), config)
    schedule = Schedule(examples, config, job.row_length, companions.pad_token_id, expands)
    num_tokens = schedule.count_tokens(steps)
    with progress.task(f"train {job.branch}", num_tokens, "tokens") as task:
        task.skip(position.num_tokens)
        while position.step < steps:
            before = position.num_tokens
            batches = schedule.batches(position.step)
            position = _train_step(model, optimizer, batches, steps, config, position)
            seen = position.num_examples + schedule.num_examples(position.step - 1)
            position = replace(position, num_examples=seen)
            task.advance(position.num_tokens - before, f"loss {position.losses[-1]:.3f}")
            if position.step % config.checkpoint_steps == 0 and position.step < steps:
                write_checkpoint(directory, optimizer.state(), position)
                _write_timing(directory, earlier_s + time.perf_counter() - start, patch)
    manifest = _write_branch(job, model, config, position, directory, companions)
    _write_timing(directory, earlier_s + time.perf_counter() - start, patch)
    remove_checkpoint(directory)
    return manifest


def _expands_trees(model: nn.Module, examples: ChainedExamples) -> bool:
    """Whether the model reads the texts of trees one by one."""
    trees = examples.tree_indices
    if not len(trees):
        return False
    lengths = examples.lengths[trees]
    tried = {int(trees[lengths.argmin()]), int(trees[lengths.argmax()])}
    return not reads_trees(model, [examples[index] for index in sorted(tried)])


def _train_step(
    model: nn.Module,
    optimizer: MasterAdamW,
    batches: Sequence[Batch],
    steps: int,
    config: TrainConfig,
    position: Position,
) -> Position:
    torch.manual_seed(config.seed * 1_000_003 + position.step)  # dropout, where a model has it
    targets = sum(batch.num_target_tokens for batch in batches)
    loss_sum = 0.0
    for batch in batches:
        # the mean over the whole step's target tokens
        loss, summed = batch_loss(model, batch, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        loss_sum += summed
    if not loss_sum < float("inf"):
        raise MeritFastError(
            f"train: loss is not finite at step {position.step}; lower train.learning_rate"
        )
    optimizer.step(learning_rate(position.step, steps, config))
    return replace(
        position,
        step=position.step + 1,
        num_tokens=position.num_tokens + sum(int(batch.attention_mask.sum()) for batch in batches),
        num_target_tokens=position.num_target_tokens + targets,
        losses=(*position.losses, loss_sum / targets),
    )


def _resume(directory: Path, optimizer: MasterAdamW) -> tuple[Position, float]:
    """Loads the last checkpoint; returns the position and the seconds of training so far."""
    checkpoint = read_checkpoint(directory)
    if checkpoint is None:
        return Position(), 0.0
    tensors, position = checkpoint
    optimizer.load_state(tensors)
    timing = directory / "timing.json"
    return position, json.loads(timing.read_text())["train_s"] if timing.exists() else 0.0


def _write_branch(
    job: BranchJob,
    model: nn.Module,
    config: TrainConfig,
    position: Position,
    directory: Path,
    companions: Companions,
) -> BranchManifest:
    companions.complete(model)
    with no_loading_bar():
        save: Any = model.eval().save_pretrained
        save(directory, max_shard_size=config.max_shard_size)
    companions.write(directory)
    manifest = BranchManifest(
        branch=job.branch,
        arm=job.arm,
        group=job.group,
        datasets=tuple(dataset.name for dataset in job.datasets),
        num_examples=position.num_examples,
        num_target_tokens=position.num_target_tokens,
        num_tokens=position.num_tokens,
        steps=position.step,
        seed=config.seed,
        base_fingerprint=job.base_fingerprint,
        start_fingerprint=job.start_fingerprint,
    )
    write_text(directory / "losses.json", json.dumps(position.losses) + "\n")
    write_manifest(manifest, directory / "branch.json")
    return manifest


def _write_timing(directory: Path, train_s: float, patch: Patch) -> None:
    timing = {
        "train_s": round(train_s, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "kernels": dict(patch.replaced),
    }
    write_text(directory / "timing.json", json.dumps(timing) + "\n")


def _note_once(progress: Progress, text: str, noted: set[str]) -> None:
    """Shows a note that is new in this run: the branches of a run share most of their notes."""
    if text not in noted:
        noted.add(text)
        progress.note(text)
