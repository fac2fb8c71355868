"""The run: sketch -> split -> train -> merge -> evaluate -> report, skipping finished stages.

Stages meet only in files; ``outputs`` knows their paths and when they are up to date.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_fast.errors import InputError
from merit_fast.manifests.io import StageManifest, read_manifest
from merit_fast.manifests.schemas import EvaluateManifest
from merit_fast.manifests.stages import (
    AUDIT,
    EVALUATE,
    REPORT,
    SKETCH,
    SPLIT,
    STAGES,
    Stage,
)
from merit_fast.options.parser import to_plain
from merit_fast.pipeline.arms import Branch
from merit_fast.pipeline.branches import adopt_branches, follow_leader
from merit_fast.pipeline.config import RunConfig, write_run_config
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.upkeep import Upkeep
from merit_fast.pipeline.work import Work
from merit_fast.progress import Progress, SilentProgress
from merit_fast.train.parallel.world import require_one_process, world_size

if TYPE_CHECKING:
    from merit_fast.merge.read.remote import RemotePath
    from merit_fast.pipeline.storage.store import OutputStore
    from merit_fast.train.parallel.ranks import Ranks


class Run:
    """One configured run.

    Each stage method brings its output up to date and returns whether it had work to do. It raises
    MeritFastError if an earlier stage's output is absent, damaged or was made from another config.

    ``verify``: hash every file of the outputs and inputs. ``overwrite``: do not keep a trained
    branch that is replaced. ``dry_run``: ``preflight`` only; tokenized rows are not kept.
    ``store``: see ``Outputs``; ``units.stored`` brings inputs here and outputs there.
    """

    def __init__(
        self,
        config: RunConfig,
        progress: Progress | None = None,
        command: str = "merit-fast run",
        *,
        verify: bool = False,
        overwrite: bool = False,
        dry_run: bool = False,
        store: "OutputStore | None" = None,
    ) -> None:
        self.progress = progress or SilentProgress()
        self.outputs = Outputs(config, command, verify, store)
        self._upkeep = Upkeep(self.outputs, self.progress, keep_replaced=not overwrite)
        self.config = self.outputs.config
        self.data = RunData(self.outputs, self.progress, writes=not dry_run)
        self.work = Work(self.outputs, self.data, self.progress)
        if "torch" in sys.modules:
            self.work.set_threads()

    # ---- stages
    def sketch(self) -> bool:
        """Sketches the datasets; the processes that torchrun started share the passes."""
        split = self.config.split
        if world_size() == 1:
            if split.warmup:
                self.warm_up()
            return self._sketch(None)
        for key in ("warmup", "normalize"):
            if getattr(split, key):
                require_one_process(f"split.{key} {getattr(split, key)}")
        from merit_fast.train.parallel.ranks import joined_ranks

        with joined_ranks() as ranks:
            if not ranks.leads:
                while (message := ranks.tell(None)) is not None:
                    self.work.sketch(Path(message[0]), ranks=ranks)
                return False
            worked = self._sketch(ranks)
            ranks.tell(None)
            return worked

    def _sketch(self, ranks: "Ranks | None") -> bool:
        def work(directory: Path) -> None:
            if ranks is not None:
                ranks.tell((str(directory),))
            self.work.sketch(directory, ranks=ranks)

        return self.bring_up_to_date(self.outputs.folder(SKETCH), self.outputs.sketch, work)

    def split(self) -> bool:
        folder = self.outputs.folder(SPLIT)
        with self.claim():
            worked = self.bring_up_to_date(folder, self.outputs.split, self.work.split)
            self.outputs.put_in_force(again=False)
        return worked

    def train(self, only: str | None = None) -> bool:
        """Trains the branches, or ``only`` one.

        The processes that torchrun started train each one together.
        """
        if world_size() == 1:
            return self._train_all(None, only)
        if self.config.train.engine != "builtin":
            require_one_process(f"train.engine {self.config.train.engine}")
        from merit_fast.train.parallel.ranks import joined_ranks

        with joined_ranks() as ranks:
            self._settle_shard(ranks)
            if not ranks.leads:
                self.work.set_threads()
                follow_leader(self.outputs, self.data, ranks)
                return False
            worked = self._train_all(ranks, only)
            ranks.tell(None)
            return worked

    def _settle_shard(self, ranks: "Ranks") -> None:
        """Lets the leader choose for all processes where ``train.shard`` is auto."""
        from merit_fast.pipeline.preflight.memory import settle_shard
        from merit_fast.pipeline.preflight.training import check_division

        train = self.config.train
        if train.shard != "auto":
            return
        settled = None
        if ranks.leads:
            settled = (settle_shard(self.outputs.base, train, self.progress.note),)
        told = ranks.tell(settled)
        assert told is not None
        self.outputs.shard = "full" if told[0] == "full" else "none"
        if self.outputs.shard == "full":
            replace(train, shard="full")  # its rules
            check_division(self.outputs.base, train)

    def warm_up(self) -> bool:
        """Trains the joint run before the sketch, where ``split.warmup`` asks for one."""
        warmup = self.outputs.warmup
        with self.claim():
            adopt_branches([warmup], self.outputs, self.progress)
            return self._train(warmup)

    def release_followers(self) -> None:
        """Ends the other processes that torchrun has started, where there is nothing to train."""
        if world_size() > 1:
            from merit_fast.train.parallel.ranks import joined_ranks

            with joined_ranks() as ranks:
                ranks.tell(None)

    def _train_all(self, ranks: "Ranks | None", only: str | None) -> bool:
        plan = self.outputs.plan
        with self.claim():
            self.outputs.put_in_force(again=True)
            for note in plan.notes:
                self.progress.note(note)
            adopt_branches(plan.trained, self.outputs, self.progress)
            chosen = [branch for branch in plan.trained if only in (None, branch.name)]
            jobs = [functools.partial(self._train, branch, ranks) for branch in chosen]
            return self._upkeep.in_any_order(jobs)

    def claim(self) -> contextlib.AbstractContextManager[None]:
        """Holds the output for processes of this config.

        Raises:
            LockedError: a live process works here with another config.
        """
        return self._upkeep.claim()

    def merge(self) -> bool:
        with self.claim():
            jobs = [functools.partial(self._merge, name) for name in self.outputs.plan.merges]
            return self._upkeep.in_any_order(jobs)

    def evaluate(self) -> bool:
        outputs = self.outputs
        folder = outputs.folder(EVALUATE)
        worked = self.bring_up_to_date(folder, outputs.evaluate, self.work.evaluate)
        if self.config.evaluate.audit:
            worked |= self.bring_up_to_date(outputs.folder(AUDIT), outputs.audit, self.work.audit)
        return worked

    def report(self) -> bool:
        folder = self.outputs.folder(REPORT)
        return self.bring_up_to_date(folder, self.outputs.report, self.work.report)

    def preflight(self, stages: Sequence[Stage] = STAGES) -> None:
        """Checks what config, headers and rows tell about these stages; keeps tokenized rows only.

        Raises:
            InputError: a later step would meet a broken rule.
        """
        from merit_fast.pipeline.preflight.checks import check_stages

        self.work.set_threads()
        check_stages(self.outputs, self.data, stages)

    def all(self) -> dict[str, Any]:
        """Checks the whole run, runs all stages in order and returns ``summary()``."""
        require_one_process("run")
        self.preflight()
        with self.claim():
            for stage in STAGES:
                method: Callable[[], bool] = getattr(self, stage.name)
                method()
            return self.summary()

    def summary(self) -> dict[str, Any]:
        """Results of a finished run, JSON-ready: arms, comparisons, split, gains, paths."""
        from merit_fast.report import read_tuned

        outputs = self.outputs
        outputs.require(outputs.folder(EVALUATE), outputs.evaluate)
        outputs.require(outputs.folder(REPORT), outputs.report)
        for name in outputs.plan.merges:
            outputs.require(outputs.merge_path(name), outputs.merge(name))
        evaluation = read_manifest(EvaluateManifest, outputs.file(EVALUATE))
        tuned = read_tuned(outputs.root, evaluation)
        merged: Path | RemotePath = outputs.merge_path("merit")
        if outputs.store is not None:  # which has the weights
            name = outputs.records.name(outputs.merge_path("merit"))
            merged = outputs.store.folder(name, outputs.merge("merit").fingerprint)
        return {
            "arms": {name: to_plain(result) for name, result in evaluation.arms.items()},
            "branches": {name: to_plain(result) for name, result in evaluation.branches.items()},
            "comparisons": [to_plain(comparison) for comparison in evaluation.comparisons],
            "notes": list(outputs.plan.notes),
            "split": outputs.split_manifest.group_of("merit"),
            "merging_gain": evaluation.merging_gain["merit"].gain,
            "merging_gains": {arm: gain.gain for arm, gain in evaluation.merging_gain.items()},
            "tuned": {arm: to_plain(manifest) for arm, manifest in tuned.items()},
            "merged": str(merged),
            "report": str(outputs.file(REPORT)),
        }

    def _train(self, branch: Branch, ranks: "Ranks | None" = None) -> bool:
        path = self.outputs.branch_path(branch.name)
        work = functools.partial(self.work.train, branch=branch, ranks=ranks)
        return self.bring_up_to_date(path, self.outputs.branch(branch), work)

    def _merge(self, name: str) -> bool:
        work = functools.partial(self.work.merge, name=name)
        return self.bring_up_to_date(self.outputs.merge_path(name), self.outputs.merge(name), work)

    def bring_up_to_date(
        self, path: Path, manifest: StageManifest, work: Callable[[Path], None]
    ) -> bool:
        """Fills ``path`` by ``work`` unless it is up to date; the rule of every stage."""

        def work_and_config(directory: Path) -> None:
            self.work.set_threads(manifest.stage)
            work(directory)
            write_run_config(self.config, directory / "config.yml")

        with self.claim():
            return self._upkeep.bring(path, manifest, work_and_config)

    def take(self, path: Path, manifest: StageManifest, whole: bool = True) -> None:
        """Makes ``path`` a copy of a finished output of the run's store, if it is not one yet.

        ``whole``: False: of its JSON files only.

        Raises:
            MeritFastError: the store cannot be read, or a file there is not as it was sent.
        """
        assert self.outputs.store is not None
        with self.claim():
            self._upkeep.take(path, manifest, self.outputs.store, whole)


def check_output(config: RunConfig) -> None:
    """Refuses an output directory that is a file or a model.

    Raises:
        InputError: the output is one of these.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"output: must be a directory, got the file {output}")
    if output.exists() and (output / "config.json").exists():
        raise InputError(f"output: must not be a model directory, got {output}")
