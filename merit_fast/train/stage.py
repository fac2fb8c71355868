"""The train stage: full fine-tuning of one branch, resumable to the same bytes."""

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merit_fast.data import Dataset, Example, collate, load_tokenizer, pack, pad_token_id
from merit_fast.errors import InputError, MeritFastError
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.model import load_model, no_loading_bar, peak_memory_bytes, reset_peak_memory
from merit_fast.patch.model import Patch, patch_model
from merit_fast.progress import Progress as Display
from merit_fast.train.config import TrainConfig
from merit_fast.train.loss import batch_loss, choose_attention, require_packing
from merit_fast.train.optimizer import MasterAdamW
from merit_fast.train.resume import Progress, read_checkpoint, remove_checkpoint, write_checkpoint
from merit_fast.train.schedule import learning_rate, num_steps, step_examples


@dataclass(frozen=True)
class BranchJob:
    """One branch to train: who it is and on what."""

    branch: str
    arm: str
    group: int
    datasets: tuple[Dataset, ...]
    start_path: str
    base_fingerprint: str
    start_fingerprint: str


def train_branch(
    job: BranchJob, config: TrainConfig, directory: Path, display: Display
) -> BranchManifest:
    """Fine-tunes the base on the job's datasets and leaves a checkpoint that transformers loads, with branch.json.

    Every step's examples, learning rate and random state depend on (seed, step) alone, so a run that was killed goes
    on from its last checkpoint in ``directory`` and ends with the same bytes.

    Args:
        job: what to train on what.
        config: the recipe.
        directory: an output directory still under its temporary name.
        display: where progress goes.

    Returns:
        The manifest that was written. Wall time and peak memory go to timing.json beside it, which is no part of the
        result.
    """
    examples = [example for dataset in job.datasets for example in dataset.examples]
    if not examples:
        raise InputError(f"{job.branch}: has no example to train on")
    reset_peak_memory()
    start = time.perf_counter()
    model = load_model(job.start_path, config.dtype).train()
    patch = patch_model(model, config.kernels)
    _say(display, str(patch))  # type: ignore[arg-type]
    choose_attention(model)
    if config.packing:
        require_packing(model, examples)
    optimizer = MasterAdamW(model, config, "eager" if config.kernels == "eager" else None)
    progress, earlier_s = _resume(directory, optimizer)
    padding = pad_token_id(load_tokenizer(job.start_path))
    steps = num_steps(len(examples), config)
    with display.task(
        f"train {job.branch}", sum(len(e.input_ids) for e in examples) * config.epochs, "tokens"
    ) as task:
        task.advance(progress.num_tokens)
        while progress.step < steps:
            chosen = [examples[i] for i in step_examples(progress.step, len(examples), config)]
            progress = _train_step(model, optimizer, chosen, padding, steps, config, progress)
            task.advance(sum(len(e.input_ids) for e in chosen), f"loss {progress.losses[-1]:.3f}")
            if progress.step % config.checkpoint_steps == 0 and progress.step < steps:
                write_checkpoint(directory, optimizer.state(), progress)
                _write_timing(directory, earlier_s + time.perf_counter() - start, patch)
    manifest = _write_branch(job, model, config, progress, directory)
    _write_timing(directory, earlier_s + time.perf_counter() - start, patch)
    remove_checkpoint(directory)
    return manifest


def _train_step(
    model: nn.Module,
    optimizer: MasterAdamW,
    examples: Sequence[Example],
    padding: int,
    steps: int,
    config: TrainConfig,
    progress: Progress,
) -> Progress:
    torch.manual_seed(config.seed * 1_000_003 + progress.step)  # dropout, where a model has it
    micro = -(-len(examples) // config.accumulation)
    parts = [examples[at : at + micro] for at in range(0, len(examples), micro)]
    ids = [0] * micro
    batches = [
        pack(part, ids[: len(part)]) if config.packing else collate(part, ids[: len(part)], padding)
        for part in parts
    ]
    targets = sum(batch.num_target_tokens for batch in batches)
    loss_sum = 0.0
    for batch in batches:
        loss, summed = batch_loss(
            model, batch, targets
        )  # the mean over the whole step's target tokens
        loss.backward()  # type: ignore[no-untyped-call]
        loss_sum += summed
    if not loss_sum < float("inf"):
        raise MeritFastError(
            f"train: loss is not finite at step {progress.step}; lower train.learning_rate"
        )
    optimizer.step(learning_rate(progress.step, steps, config))
    return replace(
        progress,
        step=progress.step + 1,
        num_examples=progress.num_examples + len(examples),
        num_tokens=progress.num_tokens + sum(len(e.input_ids) for e in examples),
        num_target_tokens=progress.num_target_tokens + targets,
        losses=(*progress.losses, loss_sum / targets),
    )


def _resume(directory: Path, optimizer: MasterAdamW) -> tuple[Progress, float]:
    found = read_checkpoint(directory)
    if found is None:
        return Progress(), 0.0
    tensors, progress = found
    optimizer.load_state(tensors)
    timing = directory / "timing.json"
    return progress, json.loads(timing.read_text())["train_s"] if timing.exists() else 0.0


def _write_branch(
    job: BranchJob, model: nn.Module, config: TrainConfig, progress: Progress, directory: Path
) -> BranchManifest:
    with no_loading_bar():
        model.eval().save_pretrained(directory, max_shard_size=config.max_shard_size)  # type: ignore[operator]
    load_tokenizer(job.start_path).save_pretrained(directory)
    manifest = BranchManifest(
        branch=job.branch,
        arm=job.arm,
        group=job.group,
        datasets=tuple(dataset.name for dataset in job.datasets),
        num_examples=progress.num_examples,
        num_target_tokens=progress.num_target_tokens,
        num_tokens=progress.num_tokens,
        steps=progress.step,
        seed=config.seed,
        base_fingerprint=job.base_fingerprint,
        start_fingerprint=job.start_fingerprint,
    )
    write_text(directory / "losses.json", json.dumps(progress.losses) + "\n")
    write_manifest(manifest, directory / "branch.json")
    return manifest


def _write_timing(directory: Path, train_s: float, patch: Patch) -> None:
    timing = {
        "train_s": round(train_s, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "kernels": dict(patch.replaced),
    }
    write_text(directory / "timing.json", json.dumps(timing) + "\n")


@functools.cache
def _say(display: Any, text: str) -> None:
    """A note that is shown once, however many branches have it."""
    display.note(text)
