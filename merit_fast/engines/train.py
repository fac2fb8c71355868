"""Trains one branch of a run by another stack, and gives it the files of a branch."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from merit_fast.data.saved import write_data_options
from merit_fast.engines.files import BranchFiles, write_branch_files
from merit_fast.engines.process import last_lines, only_stack, run_logged
from merit_fast.engines.result import check_result, result_folder, take_over
from merit_fast.engines.stacks import STACKS, command_of
from merit_fast.engines.tokens import BRANCH_FILE, Trained, trained_of
from merit_fast.errors import MeritFastError
from merit_fast.export.chosen import Group, rows_of_branches
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.merge.read.adapters.folder import is_adapter
from merit_fast.pipeline.arms import Branch
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.progress import Progress
from merit_fast.train.config import TrainConfig

_WORK = "work"  # folder of rows, configuration and checkpoints within an unfinished branch
LOG_FILE = "engine.log"
ENGINE_FILE = "engine.json"


def train_by_engine(
    branch: Branch, directory: Path, outputs: Outputs, data: RunData, progress: Progress
) -> BranchManifest:
    """Trains a branch by the stack that ``train.engine`` names; writes branch.json.

    The stack gets the branch's rows and a configuration in its own form, and runs in a process of
    its own. A failure leaves its checkpoints, and the next call resumes from the last whole one.

    Args:
        branch: the branch.
        directory: its output directory under its temporary name.
        outputs: paths and fingerprints of the run.
        data: rows of the run.
        progress: display of the run.

    Raises:
        InputError: the stack cannot train on a row as the run does.
        MeritFastError: the stack fails, gives back no model of this start, or still runs from an
            earlier call.
    """
    (group,) = rows_of_branches([branch], data)
    work = directory.absolute() / _WORK
    work.mkdir(exist_ok=True)
    with only_stack(work) as lock:
        return _train(branch, group, directory, outputs, lock, progress)


def _train(
    branch: Branch,
    group: Group,
    directory: Path,
    outputs: Outputs,
    lock: int,
    progress: Progress,
) -> BranchManifest:
    """Writes the files, runs the stack, and checks and takes over its model."""
    recipe = outputs.recipe(branch)
    work = directory.absolute() / _WORK
    files = write_branch_files(branch, group, outputs, work, recipe)
    start, start_fingerprint = outputs.start_of(branch)
    values = {
        "config": str(files.config),
        "base": str(start),
        "out": str(files.out),
        "branch": branch.name,
        "group": str(branch.group),
        "seed": str(recipe.seed),
        "column": files.column,
    }
    command = command_of(recipe, files.rows, values)
    seconds = _run(command, branch, recipe, work, lock, progress)
    result = replace(files, out=result_folder(files.out))
    check_result(result.out, start, start_fingerprint)
    trained = trained_of(files.out, group, _configured_epochs(files, recipe), start_fingerprint)
    if trained.steps < trained.max_steps:
        progress.note(
            f"{branch.name}: {recipe.engine} stopped at step {trained.steps} of {trained.max_steps}"
        )
    progress.note(f"{branch.name}: {trained.num_target_tokens:,} target tokens, {trained.source}")
    return _finish(branch, directory, outputs, result, trained, group, command, seconds)


def _run(
    command: list[str],
    branch: Branch,
    recipe: TrainConfig,
    work: Path,
    lock: int,
    progress: Progress,
) -> float:
    """Runs the stack; returns the seconds that it took.

    Raises:
        MeritFastError: its exit code is not 0.
    """
    log = work / LOG_FILE
    progress.note(f"train {branch.name}: {recipe.engine} trains it; its log: {log}")
    began = time.perf_counter()
    code = run_logged(command, log, lock)
    if code:
        for line in last_lines(log):
            progress.note(f"{recipe.engine}: {line}")
        found = f"signal {-code}" if code < 0 else f"exit code {code}"
        last = (last_lines(log) or ["no output"])[-1]
        raise MeritFastError(
            f"train {branch.name}: {recipe.engine} ended with {found}: {last}; its log: {log}"
        )
    return time.perf_counter() - began


def _configured_epochs(files: BranchFiles, recipe: TrainConfig) -> float:
    value = files.values.get(STACKS[recipe.engine].epochs_key, recipe.epochs)
    return float(value)


def _finish(
    branch: Branch,
    directory: Path,
    outputs: Outputs,
    files: BranchFiles,
    trained: Trained,
    group: Group,
    command: list[str],
    seconds: float,
) -> BranchManifest:
    """Moves the model to its place, and writes the files of a branch next to it."""
    recipe = outputs.recipe(branch)
    take_over(files.out, directory)
    shutil.copyfile(directory / _WORK / LOG_FILE, directory / LOG_FILE)
    _complete(directory, str(outputs.start_of(branch)[0]), outputs)
    manifest = BranchManifest(
        branch=branch.name,
        arm=branch.arm,
        group=branch.group,
        datasets=tuple(part.name for part in group.train),
        num_examples=trained.num_examples,
        num_target_tokens=trained.num_target_tokens,
        num_tokens=trained.num_tokens,
        steps=trained.steps,
        seed=recipe.seed,
        base_fingerprint=outputs.base_fingerprint,
        start_fingerprint=outputs.start_of(branch)[1],
    )
    record = {
        "engine": recipe.engine,
        "command": shlex.join(command),
        "tokens": trained.source,
        "config": files.values,
    }
    timing: dict[str, Any] = {"train_s": round(seconds, 3), "peak_memory_bytes": 0, "kernels": {}}
    write_text(directory / ENGINE_FILE, json.dumps(record, indent=1, default=str) + "\n")
    write_text(directory / "losses.json", json.dumps(trained.losses) + "\n")
    write_text(directory / "timing.json", json.dumps(timing) + "\n")
    write_manifest(manifest, directory / BRANCH_FILE)
    shutil.rmtree(directory / _WORK)
    return manifest


def _complete(directory: Path, start: str, outputs: Outputs) -> None:
    """Adds the run's options of rows, and the tokenizer where the stack saved none with a model."""
    has_tokenizer = (directory / "tokenizer_config.json").is_file()
    if has_tokenizer or is_adapter(directory):
        write_data_options(outputs.config.data, directory)
        return
    from merit_fast.train.companions import Companions

    Companions(start, outputs.config.data).write(directory)
