"""The train stage: full fine-tuning of one branch, resumable to the same bytes."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merit_fast.data import Batch, Dataset, Example, collate, load_tokenizer, pack, pad_token_id
from merit_fast.data.dataset import ChainedExamples
from merit_fast.errors import InputError, MeritFastError
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.model import load_model, no_loading_bar, peak_memory_bytes, reset_peak_memory
from merit_fast.patch.model import Patch, patch_model
from merit_fast.progress import Progress
from merit_fast.train.config import TrainConfig
from merit_fast.train.loss import batch_loss, choose_attention, require_packing
from merit_fast.train.optimizer import MasterAdamW
from merit_fast.train.packing import PackedSchedule
from merit_fast.train.resume import Position, read_checkpoint, remove_checkpoint, write_checkpoint
from merit_fast.train.schedule import count_tokens, learning_rate, num_steps, step_examples


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
        InputError: the job has no example, or the model cannot take packed rows.
        MeritFastError: the loss is not finite.
    """
    examples = ChainedExamples(job.datasets)
    if not len(examples):
        raise InputError(f"{job.branch}: has no example to train on")
    reset_peak_memory()
    start = time.perf_counter()
    model = load_model(job.start_path, config.dtype).train()
    patch = patch_model(model, config.kernels)
    _note_once(progress, str(patch), set() if noted is None else noted)
    choose_attention(model)
    if config.packing:
        require_packing(model, examples.shortest(8))
    optimizer = MasterAdamW(model, config, "eager" if config.kernels == "eager" else None)
    position, earlier_s = _resume(directory, optimizer)
    padding = pad_token_id(load_tokenizer(job.start_path))
    steps = job.steps or num_steps(len(examples), config)
    schedule = _Schedule(examples, config, job.row_length, padding)
    num_tokens = schedule.count_tokens(steps)
    with progress.task(f"train {job.branch}", num_tokens, "tokens") as task:
        task.skip(position.num_tokens)
        while position.step < steps:
            before = position.num_tokens
            batches = schedule.batches(position.step)
            position = _train_step(model, optimizer, batches, steps, config, position)
            task.advance(position.num_tokens - before, f"loss {position.losses[-1]:.3f}")
            if position.step % config.checkpoint_steps == 0 and position.step < steps:
                write_checkpoint(directory, optimizer.state(), position)
                _write_timing(directory, earlier_s + time.perf_counter() - start, patch)
    manifest = _write_branch(job, model, config, position, directory)
    _write_timing(directory, earlier_s + time.perf_counter() - start, patch)
    remove_checkpoint(directory)
    return manifest


class _Schedule:
    """The micro-batches of every step."""

    def __init__(
        self,
        examples: ChainedExamples,
        config: TrainConfig,
        row_length: int | None,
        padding: int,
    ) -> None:
        self.examples = examples
        self.config = config
        self.padding = padding
        self.packed = (
            PackedSchedule(examples.lengths, config, row_length) if config.packing else None
        )

    def count_tokens(self, steps: int) -> int:
        """Tokens that pass through the model in ``steps`` steps."""
        if self.packed is not None:
            return self.packed.count_tokens(steps)
        return count_tokens(self.examples.lengths, steps, self.config)

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of one step."""
        if self.packed is not None:
            rows = [[self.examples[int(i)] for i in row] for row in self.packed.rows(step)]
            return [pack(row, [0] * len(row)) for row in rows]
        chosen = step_examples(step, len(self.examples), self.config)
        return micro_batches([self.examples[int(i)] for i in chosen], self.config, self.padding)


def micro_batches(examples: Sequence[Example], config: TrainConfig, padding: int) -> list[Batch]:
    """The examples of one step in ``config.accumulation`` padded batches, or fewer."""
    size = -(-len(examples) // config.accumulation)
    batches = []
    for first in range(0, len(examples), size):
        rows = examples[first : first + size]
        batches.append(collate(rows, [0] * len(rows), padding))
    return batches


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
        num_examples=position.num_examples + sum(len(batch.dataset_ids) for batch in batches),
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
    job: BranchJob, model: nn.Module, config: TrainConfig, position: Position, directory: Path
) -> BranchManifest:
    with no_loading_bar():
        save: Any = model.eval().save_pretrained
        save(directory, max_shard_size=config.max_shard_size)
    load_tokenizer(job.start_path).save_pretrained(directory)
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
