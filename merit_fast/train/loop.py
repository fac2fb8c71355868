"""The steps of a branch from its last checkpoint to its end."""

import json
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from merit_fast.errors import InputError, MeritFastError
from merit_fast.manifests.atomic import write_text
from merit_fast.model import peak_memory_bytes
from merit_fast.progress import Progress
from merit_fast.train.config import TrainConfig
from merit_fast.train.metrics.held_out import HeldOut
from merit_fast.train.metrics.log import MetricsLog
from merit_fast.train.metrics.record import HeldOutRecord, StepRecord
from merit_fast.train.metrics.trackers import Trackers
from merit_fast.train.optimizer import MasterAdamW
from merit_fast.train.parallel.ranks import Ranks
from merit_fast.train.prepare import TrainedModel
from merit_fast.train.resume import (
    BEST_FILE,
    Fill,
    Position,
    fill_from_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from merit_fast.train.step import train_step
from merit_fast.train.steps import Schedule

_TIMING_FILE = "timing.json"


class End(NamedTuple):
    """The end of a branch's training."""

    kept: Position  # of the weights that the branch keeps
    last: Position  # of the last step


@dataclass
class Loop:
    """A branch in training."""

    branch: str
    datasets: Sequence[str]  # their names
    config: TrainConfig
    directory: Path
    trained: TrainedModel
    optimizer: MasterAdamW
    schedule: Schedule
    steps: int
    held_out: HeldOut
    ranks: Ranks
    start: float = field(default_factory=time.perf_counter)
    earlier_s: float = 0.0  # of training before the last checkpoint

    def run(self, trackers: Trackers, progress: Progress) -> End:
        """Trains to the end; the model then has the weights that the branch keeps.

        Raises:
            InputError: a file of the killed run is damaged.
            MeritFastError: a loss or a gradient is not finite.
        """
        position = self._resume()
        num_measured = len(position.held_out)
        log = MetricsLog(self.directory, position.step, num_measured) if self.ranks.leads else None
        num_tokens = self.schedule.count_tokens(self.steps)
        try:
            trackers.begin(self.trained.model, position.step, self.steps)
            with progress.task(f"train {self.branch}", num_tokens, "tokens") as task:
                task.skip(position.num_tokens)
                while position.step < self.steps and not self.held_out.is_over(position):
                    before = position.num_tokens
                    position = self._step(position, log, trackers)
                    task.advance(position.num_tokens - before, f"loss {position.losses[-1]:.3f}")
                    self._checkpoint(position, log)
        finally:
            if log is not None:
                log.close()
            trackers.end()
        if self.config.patience is None or not (self.ranks.leads or self._is_divided):
            return End(position, position)
        kept = self._take_best()
        progress.note(
            f"{self.branch}: keeps step {kept.step} of {position.step}, whose held-out loss is "
            f"{kept.held_out[-1]:.4f}"
        )
        return End(kept, position)

    def write_timing(self) -> None:
        """Writes the wall time so far and the peak memory."""
        seconds = self.earlier_s + time.perf_counter() - self.start
        timing = {
            "train_s": round(seconds, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "kernels": dict(self.trained.patch.replaced),
        }
        write_text(self.directory / _TIMING_FILE, json.dumps(timing) + "\n")

    def _step(self, position: Position, log: MetricsLog | None, trackers: Trackers) -> Position:
        moved, record = train_step(
            self.trained,
            self.optimizer,
            self.schedule.batches(position.step),
            self.datasets,
            self.steps,
            self.config,
            position,
            self.ranks,
        )
        seen = position.num_examples + self.schedule.num_examples(position.step)
        moved = replace(moved, num_examples=seen)
        _report(record, log, trackers)
        if self.held_out.is_due(moved.step, self.steps):
            moved = self._measure(moved, log, trackers)
        return moved

    def _measure(self, position: Position, log: MetricsLog | None, trackers: Trackers) -> Position:
        sums = self.held_out.measure(self.trained, self.ranks)
        if not sums.mean < float("inf"):
            raise MeritFastError(
                f"train: {self.branch}: held-out loss is not finite at step {position.step}; the "
                "last checkpoint is kept"
            )
        measured = replace(position, held_out=(*position.held_out, sums.mean))
        is_best = measured.best == len(measured.held_out) - 1
        if self.config.patience is not None and is_best and self._writes:
            write_checkpoint(self.directory, self._weights(), measured, BEST_FILE, self.ranks)
        record = HeldOutRecord(position.step, sums)
        _report(record, log, trackers)
        return measured

    def _checkpoint(self, position: Position, log: MetricsLog | None) -> None:
        if position.step % self.config.checkpoint_steps or position.step >= self.steps:
            return
        if log is not None:
            log.sync()
        if self._writes:
            state = self.optimizer.state()
            write_checkpoint(self.directory, state, position, ranks=self.ranks)
        if self.ranks.leads:
            self.write_timing()

    @property
    def _is_divided(self) -> bool:
        return self.optimizer.is_divided

    @property
    def _writes(self) -> bool:
        """Whether this process takes part in writing a checkpoint."""
        return self.ranks.leads or self._is_divided

    def _weights(self) -> dict[str, Tensor]:
        pairs = zip(self.optimizer.names, self.optimizer.parameters, strict=True)
        return {name: parameter.detach() for name, parameter in pairs}

    def _take_best(self) -> Position:
        position = self._fill_weights() if self._is_divided else self._read_weights()
        if position is None:
            raise InputError(
                f"{self.directory / BEST_FILE}: is not there; remove the folder to train the "
                "branch from its start"
            )
        return position

    def _read_weights(self) -> Position | None:
        best = read_checkpoint(self.directory, BEST_FILE)
        if best is None:
            return None
        tensors, position = best
        for name, weight in self._weights().items():
            weight.copy_(tensors[name])
        return position

    def _fill_weights(self) -> Position | None:
        def fill(names: Container[str], read: Fill) -> None:
            for name, weight in self._weights().items():
                read(name, weight)

        return fill_from_checkpoint(self.directory, fill, self.ranks, BEST_FILE)

    def _read_state(self) -> Position | None:
        if self._is_divided:
            return fill_from_checkpoint(self.directory, self.optimizer.fill_state, self.ranks)
        checkpoint = read_checkpoint(self.directory)
        if checkpoint is None:
            return None
        tensors, position = checkpoint
        self.optimizer.load_state(tensors)
        return position

    def _resume(self) -> Position:
        position = self._read_state()
        if position is None:
            return Position()
        timing = self.directory / _TIMING_FILE
        self.earlier_s = json.loads(timing.read_text())["train_s"] if timing.exists() else 0.0
        return position


def _report(record: StepRecord | HeldOutRecord, log: MetricsLog | None, trackers: Trackers) -> None:
    if log is not None:
        log.write(record)
    trackers.log(record)
