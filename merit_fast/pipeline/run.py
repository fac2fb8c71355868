"""The run: sketch -> split -> train -> merge -> evaluate -> report, each skipped when its output is up to date.

Stages meet in files only; ``outputs`` says where they lie and when they are up to date.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merit_fast.data import Dataset, load_mixture, load_tokenizer, pad_token_id
from merit_fast.errors import InputError
from merit_fast.manifests.io import (
    StageManifest,
    is_complete,
    output_directory,
    read_manifest,
    recover_directory,
    write_manifest,
)
from merit_fast.manifests.schemas import (
    TUNE_FILE,
    AuditManifest,
    EvaluateManifest,
    SplitManifest,
    TuneManifest,
)
from merit_fast.merge import merge_branches, resolve_weights
from merit_fast.options.fields import to_plain
from merit_fast.pipeline import arms
from merit_fast.pipeline.arms import Branch
from merit_fast.pipeline.config import RunConfig, write_run_config
from merit_fast.pipeline.outputs import Outputs
from merit_fast.progress import Progress, SilentProgress
from merit_fast.report import audit_sentence, split_lines

STAGES = ("sketch", "split", "train", "merge", "evaluate", "report")


class Run:
    """One configured run. Every stage method brings its output up to date and returns whether it had to work.

    A stage method raises MeritFastError if an earlier stage's output is absent or was made from another config.
    """

    def __init__(
        self, config: RunConfig, progress: Progress | None = None, command: str = "merit-fast run"
    ) -> None:
        self.progress = progress or SilentProgress()
        self.outputs = Outputs(config, command)
        self.config = self.outputs.config
        if config.threads is not None:
            import torch

            torch.set_num_threads(config.threads)

    # ---- stages
    def sketch(self) -> bool:
        from merit_fast.sketch import sketch_mixture

        outputs = self.outputs

        def work(directory: Path) -> None:
            config, mark = self.config.split.sketch_config(), outputs.start_fingerprint
            datasets, pad = self._branch_data, self._pad_token_id
            earlier = outputs.root / "sketch"
            sketch_mixture(
                str(outputs.start), mark, datasets, pad, config, directory, self.progress, earlier
            )

        if self.config.split.warmup:
            self._train(arms.warmup_branch(self.config))
        return self._bring_up_to_date(outputs.root / "sketch", outputs.sketch, work)

    def split(self) -> bool:
        from merit_fast.split import split_mixture

        outputs = self.outputs

        def work(directory: Path) -> None:
            outputs.require(outputs.root / "sketch", outputs.sketch)
            datasets, mark, config = self._branch_data, outputs.train_fingerprint, self.config.split
            manifest = split_mixture(
                outputs.root / "sketch", datasets, mark, config,
                steps=self._steps(self._branch_data), sketched_at=self._where, texts=self._texts,
            )  # fmt: skip
            write_manifest(manifest, directory / "split.json")
            for line in split_lines(manifest, self._branch_steps(manifest)):
                self.progress.note(line)

        return self._bring_up_to_date(outputs.root / "split", outputs.split, work)

    def train(self) -> bool:
        return any([self._train(branch) for branch in self.outputs.branches.values()])

    def merge(self) -> bool:
        worked = False
        for arm in arms.merged_arms(self.config):
            work = functools.partial(self._merge_one, arm)
            worked |= self._bring_up_to_date(
                self.outputs.root / "merged" / arm, self.outputs.merge(arm), work
            )
        return worked

    def evaluate(self) -> bool:
        from merit_fast.evaluate import evaluate_arms
        from merit_fast.evaluate.stage import Candidates

        outputs = self.outputs

        def work(directory: Path) -> None:
            branches = {name: outputs.branch_path(name) for name in outputs.branches}
            candidates = Candidates(outputs.base, branches, self._merges())
            tokenizer, pad, config = self._tokenizer, self._pad_token_id, self.config.evaluate
            evaluate_arms(
                candidates, self._eval_data, tokenizer, pad, config, directory, self.progress
            )

        worked = self._bring_up_to_date(outputs.root / "evaluate", outputs.evaluate, work)
        if self.config.evaluate.audit:
            worked |= self._bring_up_to_date(outputs.root / "audit", outputs.audit, self._audit)
        return worked

    def report(self) -> bool:
        from merit_fast.report import read_tuned, write_report

        outputs = self.outputs

        def work(directory: Path) -> None:
            outputs.require(outputs.root / "evaluate", outputs.evaluate)
            evaluation = read_manifest(
                EvaluateManifest, outputs.root / "evaluate" / "evaluate.json"
            )
            audit = None
            if self.config.evaluate.audit:
                outputs.require(outputs.root / "audit", outputs.audit)
                audit = read_manifest(AuditManifest, outputs.root / "audit" / "audit.json")
            path, title, tuned = (
                directory / "report.html",
                outputs.root.name,
                read_tuned(outputs.root, evaluation),
            )
            write_report(
                outputs.split_manifest, evaluation, path,
                title=title, notes=self._notes(), audit=audit, tuned=tuned,
            )  # fmt: skip

        return self._bring_up_to_date(outputs.root / "report", outputs.report, work)

    def all(self) -> dict[str, Any]:
        """All stages in order; returns ``summary()``."""
        for stage in STAGES:
            method: Callable[[], bool] = getattr(self, stage)
            method()
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """What a finished run says, JSON-ready: arms, split, merging gains, the report's path."""
        from merit_fast.report import read_tuned

        root = self.outputs.root
        evaluation = read_manifest(EvaluateManifest, root / "evaluate" / "evaluate.json")
        return {
            "arms": {name: to_plain(result) for name, result in evaluation.arms.items()},
            "branches": {name: to_plain(result) for name, result in evaluation.branches.items()},
            "split": self.outputs.split_manifest.group_of("merit"),
            "merging_gain": evaluation.merging_gain["merit"].gain,
            "merging_gains": {arm: gain.gain for arm, gain in evaluation.merging_gain.items()},
            "tuned": {arm: to_plain(found) for arm, found in read_tuned(root, evaluation).items()},
            "merged": str(root / "merged" / "merit"),
            "report": str(root / "report" / "report.html"),
        }

    def _steps(self, datasets: Sequence[Dataset]) -> int:
        """Optimizer steps of a run on these."""
        from merit_fast.train.schedule import num_steps

        return num_steps(
            sum(dataset.num_examples for dataset in datasets), self.outputs.train_config
        )

    def _branch_steps(self, split: SplitManifest) -> list[int]:
        """[K] of MERIT's branches."""
        planned = [
            branch for branch in arms.branches(self.config, split).values() if branch.arm == "merit"
        ]
        return [self._steps(branch.choose(self._train_data, self.config)) for branch in planned]

    def _texts(self) -> dict[str, list[str]]:
        decode = self._tokenizer.batch_decode
        return {
            d.name: decode([e.input_ids for e in d.examples], skip_special_tokens=True)
            for d in self._branch_data
        }

    # ---- work of one branch, one merge, one audit
    def _train(self, branch: Branch) -> bool:
        path, work = (
            self.outputs.branch_path(branch.name),
            functools.partial(self._train_one, branch),
        )
        return self._bring_up_to_date(path, self.outputs.branch(branch), work)

    def _train_one(self, branch: Branch, directory: Path) -> None:
        from merit_fast.train import train_branch
        from merit_fast.train.schedule import FEW_STEPS
        from merit_fast.train.stage import BranchJob

        name, datasets, config = (
            branch.name,
            branch.choose(self._train_data, self.config),
            self.outputs.train_config,
        )
        steps = self._steps(datasets)
        if steps < FEW_STEPS:
            self.progress.note(
                f"{name}: {steps} steps; below about {FEW_STEPS} a branch is far from converged"
            )
        if self.config.merge.is_tuned:
            _ = self._held_out  # too few are refused now, not after the training
        start, mark = self.outputs.start_of(branch)
        job = BranchJob(name, branch.arm, branch.group, datasets, str(start), mark)
        train_branch(job, config, directory, self.progress)

    def _merge_one(self, arm: str, directory: Path) -> None:
        outputs = self.outputs
        for name in outputs.branches_of(arm):
            outputs.require(outputs.branch_path(name), outputs.branch(outputs.branches[name]))
        paths, config = outputs.branch_paths(arm), self.config.merge
        if config.is_tuned:
            chosen = self._tune(arm, paths, directory)
            config = config.filled(chosen.weights, chosen.scale)
        weights = resolve_weights(paths, config)
        merge_branches(paths, weights, outputs.start, directory, config, self.progress)

    def _tune(self, arm: str, paths: list[Path], directory: Path) -> TuneManifest:
        from merit_fast.evaluate.audit import audit_rows
        from merit_fast.tune.search import Candidates, starting_weights, tune_merge, tuning_sentence

        config = self.config.merge
        names, start = tuple(self.outputs.branches_of(arm)), starting_weights(paths, config)
        candidates, pad = Candidates(paths, names, start, self.outputs.start), self._pad_token_id
        rows, batch_size = (
            audit_rows(self._held_out[0], config.tune_rows),
            self.config.evaluate.batch_size,
        )
        found = tune_merge(candidates, rows, pad, batch_size, config, directory, self.progress)
        self.progress.note(f"{arm}: {tuning_sentence(found)}")
        return found

    def _merges(self) -> dict[str, Any]:
        """The merged arms, as evaluate wants them."""
        from merit_fast.evaluate.stage import Merge

        merges, outputs = {}, self.outputs
        for arm in arms.merged_arms(self.config):
            path = outputs.root / "merged" / arm
            outputs.require(path, outputs.merge(arm))
            if self.config.merge.is_tuned:
                weights = read_manifest(TuneManifest, path / TUNE_FILE).weights
            else:
                weights = tuple(resolve_weights(outputs.branch_paths(arm), self.config.merge))
            merges[arm] = Merge(path, tuple(outputs.branches_of(arm)), weights)
        return merges

    def _audit(self, directory: Path) -> None:
        from merit_fast.evaluate.audit import audit_merges

        branches = {name: self.outputs.branch_path(name) for name in self.outputs.branches}
        start, pad, config = self.outputs.start, self._pad_token_id, self.config.evaluate
        audits = audit_merges(
            self._merges(), branches, start, self._eval_data, pad, config, self.progress
        )
        write_manifest(AuditManifest(audits), directory / "audit.json")
        for arm, audit in audits.items():
            self.progress.note(f"audit {arm}: {audit_sentence(audit)}")

    # ---- data, loaded once and only when a stage works
    @functools.cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(str(self.outputs.base))

    @functools.cached_property
    def _pad_token_id(self) -> int:
        return pad_token_id(self._tokenizer)

    @functools.cached_property
    def _train_data(self) -> list[Dataset]:
        return self._load("train")

    @functools.cached_property
    def _branch_data(self) -> list[Dataset]:
        """What the branches of an arm share: the mixture without the rows of a warm-up."""
        everything = Branch("", "", 0, tuple(d.name for d in self._train_data))
        rows = replace(everything, rows="after warmup") if self.config.split.warmup else everything
        return list(rows.choose(self._train_data, self.config))

    @functools.cached_property
    def _eval_data(self) -> list[Dataset]:
        """What every arm is measured on."""
        return self._held_out[1]

    @functools.cached_property
    def _held_out(self) -> tuple[list[Dataset], list[Dataset]]:
        """Held-out rows that choose a merge's numbers, and those that report: all, where nothing is chosen."""
        from merit_fast.tune.rows import split_held_out

        rows = self._load("eval")
        return split_held_out(rows) if self.config.merge.is_tuned else ([], rows)

    def _load(self, part: Any) -> list[Dataset]:
        datasets = load_mixture(self.config.mixture, self._tokenizer, self.config.data, part=part)
        for dataset in datasets:
            for note in dataset.notes:
                self.progress.note(f"{dataset.name} ({part}): {note}")
        if part == "eval" and (absent := len(self.config.mixture) - len(datasets)):
            self.progress.note(
                f"evaluate: {absent} of {len(self.config.mixture)} datasets have no held-out rows"
            )
        return datasets

    # ---- the rule of every stage
    def _bring_up_to_date(
        self, path: Path, stage: StageManifest, work: Callable[[Path], None]
    ) -> bool:
        name = str(path.relative_to(self.outputs.root))
        recover_directory(path, stage.fingerprint)
        if is_complete(path, stage.fingerprint):
            self.progress.note(f"{name}: up to date")
            return False
        with output_directory(path, stage) as directory:
            work(directory)
            write_run_config(self.config, directory / "config.yml")
        return True

    def _notes(self) -> list[str]:
        config = self.config
        return [
            f"model {Path(config.model).name}, {len(config.mixture)} datasets, K = {config.split.groups}",
            f"sketch: {config.split.examples} examples per dataset {self._where}, width {config.split.proj_dim}",
            f"training: {config.train.epochs} epoch(s), learning rate {config.train.learning_rate:g}, "
            f"batch {config.train.batch_size}, {config.train.dtype}",
            f"seeds: split {config.split.seed}, train {config.train.seed}; every arm was trained once",
        ]

    @property
    def _where(self) -> str:
        share = self.config.split.warmup
        return f"after a joint warm-up on {share:.0%} of the rows" if share else "at the base model"


def check_output(config: RunConfig) -> None:
    """Refuses an output directory that is a file, or that is the model itself.

    Raises:
        InputError
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"output: must be a directory, got the file {output}")
    if output.exists() and (output / "config.json").exists():
        raise InputError(f"output: must not be a model directory, got {output}")
