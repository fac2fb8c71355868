"""The work of every stage of a run, each in its output directory under its temporary name."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.manifests.directories import take_files
from merit_fast.manifests.io import read_manifest, write_manifest
from merit_fast.manifests.schemas import AuditManifest, EvaluateManifest
from merit_fast.manifests.stages import AUDIT, EVALUATE, MERGE, REPORT, SKETCH, SPLIT
from merit_fast.pipeline.arms import Branch
from merit_fast.pipeline.branches import train_planned
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.merging import (
    audit_arms,
    evaluated_models,
    merge_model,
    merge_share,
    models_of,
)
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.reporting import report_options, sketch_position
from merit_fast.progress import Progress
from merit_fast.report import split_lines

if TYPE_CHECKING:
    from merit_fast.evaluate.models import EvaluationInputs
    from merit_fast.sketch.divided.crew import Crew
    from merit_fast.train.parallel.ranks import Ranks


class Work:
    """The stages' work on one run: outputs before it are there, or a method raises.

    Methods fill ``directory``; locks, records and renames are the caller's.
    """

    def __init__(self, outputs: Outputs, data: RunData, progress: Progress) -> None:
        self.outputs = outputs
        self.data = data
        self.progress = progress
        self._noted: set[str] = set()  # notes of train that this run has shown

    def set_threads(self, stage: str = "") -> None:
        """Gives torch its number of threads; it takes seconds to load, so only where it computes.

        ``stage``: the one that is about to work; a report or a merge that is not tuned has no use
        for torch.
        """
        config = self.outputs.config
        is_light = stage == REPORT.name or (stage == MERGE.name and not config.merge.is_tuned)
        if config.threads is not None and not is_light:
            import torch

            torch.set_num_threads(config.threads)

    def sketch(
        self,
        directory: Path,
        earlier: Sequence[Path] = (),
        only: str | None = None,
        share: tuple[int, int] | None = None,
        ranks: "Ranks | None" = None,
    ) -> None:
        """Sketches all datasets, or ``only`` one, or a share (i, n) of its spans.

        ``earlier``: finished outputs or parts; equal sums are taken from them. ``ranks``: the
        processes that sketch together; all of them call this.
        """
        from merit_fast.sketch import sketch_mixture

        outputs = self.outputs
        sketch_mixture(
            str(outputs.start),
            outputs.start_fingerprint,
            self.data.sketched,
            self.data.pad_token_id,
            outputs.config.split.sketch_config(),
            directory,
            self.progress,
            (outputs.folder(SKETCH), *earlier),
            outputs.config.train.freeze,
            only=only,
            share=share,
            crew=self._crew(ranks),
        )

    def _crew(self, ranks: "Ranks | None") -> "Crew":
        """The processes that share the passes of a sketch, and the model that they divide."""
        from merit_fast.sketch.divided.crew import Crew

        if ranks is None:
            return Crew()
        from merit_fast.train.parallel.load import load_divided_model

        split = self.outputs.config.split
        load = functools.partial(
            load_divided_model, str(self.outputs.start), split.dtype, ranks, "split.memory"
        )
        return Crew(ranks.rank, ranks.size, load if split.memory == "divided" else None)

    def factors(self, directory: Path) -> None:
        """Collects K-FAC's factors of all datasets."""
        from merit_fast.sketch.mixture.stage import collect_factors

        outputs = self.outputs
        collect_factors(
            str(outputs.start),
            outputs.start_fingerprint,
            self.data.sketched,
            self.data.pad_token_id,
            outputs.config.split.sketch_config(),
            directory,
            self.progress,
            (outputs.folder(SKETCH),),
            outputs.config.train.freeze,
        )

    def split(self, directory: Path) -> None:
        from merit_fast.split import split_mixture

        outputs = self.outputs
        outputs.require(outputs.folder(SKETCH), outputs.sketch)
        manifest = split_mixture(
            outputs.folder(SKETCH),
            self.data.branch,
            outputs.train_fingerprint,
            outputs.config.split,
            base_fingerprint=outputs.base_fingerprint,
            steps=self.data.num_steps(self.data.branch),
            sketched_at=sketch_position(outputs.config),
            texts=self.data.texts,
            num_controls=outputs.num_controls,
            progress=self.progress,
        )
        write_manifest(manifest, directory / SPLIT.file)
        for line in split_lines(manifest, self.data.branch_steps(manifest)):
            self.progress.note(line)

    def train(self, directory: Path, branch: Branch, ranks: "Ranks | None" = None) -> None:
        shown = (self.progress, self._noted)
        train_planned(branch, directory, self.outputs, self.data, *shown, ranks)

    def merge(self, directory: Path, name: str, shares: Sequence[Path] = ()) -> None:
        """Merges the branches of one arm and seed; ``shares``: folders with files of this merge."""
        for folder in shares:
            take_files(folder, directory)
        merge_model(name, directory, self.outputs, self.data, self.progress)

    def merge_share(self, directory: Path, name: str, share: tuple[int, int]) -> None:
        """Writes every n-th weight file of a merge from the i-th on, of a share (i, n)."""
        merge_share(name, directory, self.outputs, self.progress, share)

    def evaluate(self, directory: Path, measured: Sequence[Path] = ()) -> None:
        """Measures every model; ``measured``: folders with the results of some of them."""
        from merit_fast.evaluate import evaluate_arms

        models = evaluated_models(self.outputs)
        evaluate_arms(models, self._evaluation, directory, self.progress, measured)

    def evaluate_model(self, directory: Path, name: str, base: Path | None) -> None:
        """Measures one model; ``base``: the folder with the base's result, for every other one."""
        from merit_fast.evaluate import evaluate_model

        models = models_of(self.outputs)
        evaluate_model(name, models, self._evaluation, directory, self.progress, base)

    @property
    def _evaluation(self) -> "EvaluationInputs":
        from merit_fast.evaluate.models import EvaluationInputs

        config = self.outputs.config
        tokens = (self.data.tokenizer, self.data.pad_token_id)
        return EvaluationInputs(self.data.reporting, *tokens, config.evaluate, config.data)

    def audit(self, directory: Path) -> None:
        audit_arms(directory, self.outputs, self.data, self.progress)

    def report(self, directory: Path) -> None:
        from merit_fast.report import read_tuned, write_report
        from merit_fast.sketch.mixture.reuse import read_check

        outputs = self.outputs
        options = report_options(outputs.config, outputs.title, outputs.plan.notes)
        reported = outputs.reported
        evaluation = None
        audit = None
        if EVALUATE in reported:
            evaluation = read_manifest(EvaluateManifest, outputs.file(EVALUATE))
        else:
            self.progress.note("report: of the split only; no evaluation of this config is there")
        if AUDIT in reported:
            audit = read_manifest(AuditManifest, outputs.file(AUDIT))
        elif options.audit and evaluation is not None:
            self.progress.note("report: without an audit; no audit of this config is there")
        check = read_check(outputs.folder(SKETCH))
        checked = () if check is None else (f"sketch: {check}",)
        write_report(
            outputs.split_manifest,
            evaluation,
            directory / REPORT.file,
            title=options.title,
            notes=(*options.notes, *checked),
            audit=audit,
            tuned={} if evaluation is None else read_tuned(outputs.root, evaluation),
        )
