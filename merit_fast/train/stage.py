"""The train stage: fine-tuning of one branch, resumable to the same bytes."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

from merit_fast.data import DataConfig, Dataset
from merit_fast.data.dataset import ChainedExamples
from merit_fast.errors import InputError
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.model import reads_trees, reset_peak_memory
from merit_fast.progress import Progress, SilentProgress
from merit_fast.train.companions import Companions
from merit_fast.train.config import TrainConfig
from merit_fast.train.loop import End, Loop
from merit_fast.train.loss import choose_attention, require_packing, require_text
from merit_fast.train.metrics.held_out import HeldOut
from merit_fast.train.metrics.trackers import Trackers
from merit_fast.train.optimizer import MasterAdamW
from merit_fast.train.parallel.ranks import Ranks
from merit_fast.train.parallel.world import require_one_process
from merit_fast.train.prepare import TrainedModel, prepare_model
from merit_fast.train.resume import remove_checkpoint
from merit_fast.train.schedule import num_steps
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
    held_out: tuple[Dataset, ...] = ()  # measured every ``evaluate_steps``
    tracked: Path | None = None  # folder of trackers that write files; None: the branch's

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the datasets."""
        return tuple(dataset.name for dataset in self.datasets)


def train_branch(
    job: BranchJob,
    config: TrainConfig,
    directory: Path,
    progress: Progress,
    noted: set[str] | None = None,
    ranks: Ranks | None = None,
) -> BranchManifest:
    """Fine-tunes the start on the job's datasets; writes a model or adapter with branch.json.

    A step's examples, learning rate and random state depend only on (seed, step). A killed run
    therefore resumes from its last checkpoint in ``directory`` and ends with the same bytes.

    Args:
        job: the branch and its rows.
        config: the recipe.
        directory: an output directory that still has its temporary name.
        progress: display of the run.
        noted: notes that this run has shown already; a new note is shown and added. None: none yet.
        ranks: the processes that train the branch together; the others call ``follow_branch``.
            None: this process only.

    Returns:
        The manifest of branch.json. Wall time and peak memory go to timing.json and metrics.jsonl,
        whose seconds are no part of the result.

    Raises:
        InputError: the job has no example, the start has no chat template, an option does not fit
            the model or lacks its package or its held-out rows, or a launcher started several
            processes without ``ranks``.
        MeritFastError: the loss or the gradient is not finite.
    """
    if ranks is None:
        require_one_process("train_branch without ranks")
        ranks = Ranks()
    noted = set() if noted is None else noted
    loop, companions, trackers = _prepare(job, config, directory, progress, noted, ranks)
    end = loop.run(trackers, progress)
    manifest = _write_branch(job, loop, config, end, companions)
    loop.write_timing()
    remove_checkpoint(directory)
    return manifest


def follow_branch(job: BranchJob, config: TrainConfig, directory: Path, ranks: Ranks) -> None:
    """Takes this process's part of a branch whose ``train_branch`` runs in the leading process.

    Args:
        job: as in the leading process.
        config: as in the leading process.
        directory: as in the leading process; this one reads its checkpoint and writes nothing.
        ranks: the processes that train the branch together.

    Raises:
        InputError, MeritFastError: as ``train_branch``.
    """
    progress = SilentProgress()
    config = replace(config, report_to=())
    loop, _, trackers = _prepare(job, config, directory, progress, set(), ranks)
    loop.run(trackers, progress)
    loop.trained.write(job.start_path, directory, config, ranks)


def _prepare(
    job: BranchJob,
    config: TrainConfig,
    directory: Path,
    progress: Progress,
    noted: set[str],
    ranks: Ranks,
) -> tuple[Loop, Companions, Trackers]:
    """Loads and checks everything before the first step."""
    if config.update_in_backward is not None and ranks.size > 1 and config.shard == "none":
        raise InputError(
            "train.update_in_backward: must be absent with several processes that add whole "
            f"gradients first (train.shard: full divides them); got {config.update_in_backward!r}"
        )
    examples = ChainedExamples(job.datasets)
    if not len(examples):
        raise InputError(f"{job.branch}: has no example to train on")
    companions = Companions(job.start_path, job.data)
    padding = companions.pad_token_id
    held_out = HeldOut(job.branch, job.datasets, job.held_out, config, padding)
    trackers = Trackers(config, job.branch, job.tracked or directory, job.names)
    reset_peak_memory()
    start = time.perf_counter()
    trained = prepare_model(job.start_path, config, ranks)
    _note_once(progress, str(trained.patch), noted)
    expands = _expands_trees(trained, examples)
    if expands:
        _note_once(progress, _EXPANDED, noted)
    if expands or not len(examples.tree_indices):
        choose_attention(trained.model)
    if config.packing:
        require_text(job.datasets)
        trained.call(require_packing, examples.shortest(8))
    loop = Loop(
        branch=job.branch,
        datasets=job.names,
        config=config,
        directory=directory,
        trained=trained,
        optimizer=MasterAdamW(trained.model, config, _backend(config), ranks),
        schedule=Schedule(examples, config, job.row_length, padding, expands, ranks.size),
        steps=job.steps or num_steps(len(examples), config),
        held_out=held_out,
        ranks=ranks,
        start=start,
    )
    return loop, companions, trackers


def _backend(config: TrainConfig) -> str | None:
    return "eager" if config.kernels == "eager" else None


def _expands_trees(trained: TrainedModel, examples: ChainedExamples) -> bool:
    """Whether the model reads the texts of trees one by one.

    Routers' loss needs a mask of two dimensions, which a tree has not. A trial that fails would
    leave a divided model in the middle of its forward.
    """
    trees = examples.tree_indices
    if not len(trees) or trained.router_factor or trained.shards is not None:
        return bool(len(trees))
    lengths = examples.lengths[trees]
    tried = {int(trees[lengths.argmin()]), int(trees[lengths.argmax()])}
    return not reads_trees(trained.model, [examples[index] for index in sorted(tried)])


def _write_branch(
    job: BranchJob, loop: Loop, config: TrainConfig, end: End, companions: Companions
) -> BranchManifest:
    directory = loop.directory
    companions.complete(loop.trained.model)
    loop.trained.write(job.start_path, directory, config, loop.ranks)
    companions.write(directory)
    kept = end.kept
    manifest = BranchManifest(
        branch=job.branch,
        arm=job.arm,
        group=job.group,
        datasets=job.names,
        num_examples=kept.num_examples,
        num_target_tokens=kept.num_target_tokens,
        num_tokens=kept.num_tokens,
        steps=kept.step,
        seed=config.seed,
        base_fingerprint=job.base_fingerprint,
        start_fingerprint=job.start_fingerprint,
        steps_run=None if end.last.step == kept.step else end.last.step,
    )
    write_text(directory / "losses.json", json.dumps(end.last.losses) + "\n")
    write_manifest(manifest, directory / "branch.json")
    return manifest


def _note_once(progress: Progress, text: str, noted: set[str]) -> None:
    """Shows a note that is new in this run: the branches of a run share most of their notes."""
    if text not in noted:
        noted.add(text)
        progress.note(text)
