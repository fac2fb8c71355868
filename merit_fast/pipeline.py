"""The run: sketch -> split -> train -> merge -> evaluate -> report, each skipped when its output is up to date.

Stages meet in files only. A stage's fingerprint covers its options and its inputs' fingerprints, so that "up to date"
is decided from the config and the files alone, before anything heavy is imported.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merit_fast.config import to_plain
from merit_fast.data import Dataset, load_mixture, load_tokenizer, mixture_fingerprint, pad_token_id
from merit_fast.errors import InputError, MeritFastError
from merit_fast.manifest import (
    EvaluateManifest,
    SplitManifest,
    StageManifest,
    is_complete,
    output_directory,
    read_manifest,
    recover_directory,
    stage_manifest,
    write_manifest,
)
from merit_fast.merge import merge_branches, resolve_weights, same_bytes
from merit_fast.model import model_fingerprint, resolve_model
from merit_fast.progress import Progress, SilentProgress
from merit_fast.report import split_lines
from merit_fast.run_config import RunConfig, write_run_config

STAGES = ("sketch", "split", "train", "merge", "evaluate", "report")


class Run:
    """One configured run. Every stage method brings its output up to date and returns whether it had to work.

    A stage method raises MeritFastError if an earlier stage's output is absent or was made from another config.
    """

    def __init__(self, config: RunConfig, progress: Progress | None = None, command: str = "merit-fast run") -> None:
        self.config, self.progress, self.command = config, progress or SilentProgress(), command
        self.output = Path(config.output)
        self.base = resolve_model(config.model)
        if config.threads is not None:
            import torch

            torch.set_num_threads(config.threads)

    # ---- stages
    def sketch(self) -> bool:
        from merit_fast.split import sketch_mixture

        def work(directory: Path) -> None:
            config = self.config.split.sketch_config()
            base, mark = str(self.base), self._base_fingerprint
            sketch_mixture(base, mark, self._train_data, self._pad_token_id, config, directory, self.progress)

        return self._bring_up_to_date(self.output / "sketch", self._sketch_stage, work)

    def split(self) -> bool:
        from merit_fast.split import split_mixture

        def work(directory: Path) -> None:
            self._require(self.output / "sketch", self._sketch_stage)
            mark = self._train_fingerprint
            manifest = split_mixture(self.output / "sketch", self._train_data, mark, self.config.split)
            write_manifest(manifest, directory / "split.json")
            for line in split_lines(manifest):
                self.progress.note(line)

        return self._bring_up_to_date(self.output / "split", self._split_stage, work)

    def train(self) -> bool:
        worked = False
        for name, (arm, group, datasets) in self._branches.items():
            work = functools.partial(self._train_one, name, arm, group, datasets)
            worked |= self._bring_up_to_date(self._branch_path(name), self._branch_stage(name), work)
        return worked

    def merge(self) -> bool:
        worked = False
        for arm in self._merged_arms:
            work = functools.partial(self._merge_one, arm)
            worked |= self._bring_up_to_date(self.output / "merged" / arm, self._merge_stage(arm), work)
        return worked

    def evaluate(self) -> bool:
        from merit_fast.evaluate import evaluate_arms
        from merit_fast.evaluate.stage import Candidates, Merge

        def work(directory: Path) -> None:
            merges = {}
            for arm in self._merged_arms:
                self._require(self.output / "merged" / arm, self._merge_stage(arm))
                weights = tuple(resolve_weights(self._arm_paths(arm), self.config.merge))
                merges[arm] = Merge(self.output / "merged" / arm, tuple(self._arm_branches(arm)), weights)
            branches = {name: self._branch_path(name) for name in self._branches}
            candidates = Candidates(self.base, branches, merges)
            tokenizer, pad, config = self._tokenizer, self._pad_token_id, self.config.evaluate
            evaluate_arms(candidates, self._eval_data, tokenizer, pad, config, directory, self.progress)

        return self._bring_up_to_date(self.output / "evaluate", self._evaluate_stage, work)

    def report(self) -> bool:
        from merit_fast.report import write_report

        def work(directory: Path) -> None:
            self._require(self.output / "evaluate", self._evaluate_stage)
            evaluation = read_manifest(EvaluateManifest, self.output / "evaluate" / "evaluate.json")
            path, title = directory / "report.html", self.output.name
            write_report(self._split_manifest, evaluation, path, title=title, notes=self._notes())

        return self._bring_up_to_date(self.output / "report", self._report_stage, work)

    def all(self) -> dict[str, Any]:
        """All stages in order; returns ``summary()``."""
        for stage in STAGES:
            method: Callable[[], bool] = getattr(self, stage)
            method()
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """What a finished run says, JSON-ready: arms, split, merging gains, the report's path."""
        evaluation = read_manifest(EvaluateManifest, self.output / "evaluate" / "evaluate.json")
        return {
            "arms": {name: to_plain(result) for name, result in evaluation.arms.items()},
            "branches": {name: to_plain(result) for name, result in evaluation.branches.items()},
            "split": self._split_manifest.group_of("merit"),
            "merging_gain": evaluation.merging_gain["merit"].gain,
            "merging_gains": {arm: gain.gain for arm, gain in evaluation.merging_gain.items()},
            "merged": str(self.output / "merged" / "merit"),
            "report": str(self.output / "report" / "report.html"),
        }

    # ---- work of one branch and one merge
    def _train_one(self, name: str, arm: str, group: int, names: Sequence[str], directory: Path) -> None:
        from merit_fast.train import train_branch
        from merit_fast.train.branch import BranchJob
        from merit_fast.train.schedule import FEW_STEPS, num_steps

        datasets = tuple(d for d in self._train_data if d.name in names)
        steps = num_steps(sum(d.num_examples for d in datasets), self._train_config)
        if steps < FEW_STEPS:
            self.progress.note(f"{name}: {steps} steps; below about {FEW_STEPS} a branch is far from converged")
        job = BranchJob(name, arm, group, datasets, str(self.base), self._base_fingerprint)
        train_branch(job, self._train_config, directory, self.progress)

    def _merge_one(self, arm: str, directory: Path) -> None:
        for name in self._arm_branches(arm):
            self._require(self._branch_path(name), self._branch_stage(name))
        paths = self._arm_paths(arm)
        weights = resolve_weights(paths, self.config.merge)
        merge_branches(paths, weights, self.config.merge, directory, self.progress, self.base)

    # ---- who trains on what
    @functools.cached_property
    def _split_manifest(self) -> SplitManifest:
        self._require(self.output / "split", self._split_stage)
        return read_manifest(SplitManifest, self.output / "split" / "split.json")

    @property
    def _merged_arms(self) -> list[str]:
        return ["merit", *(["random"] if "random" in self.config.train.arms else [])]

    @functools.cached_property
    def _branches(self) -> dict[str, tuple[str, int, list[str]]]:
        """branch -> (arm, group, dataset names), joint first."""
        everything = [dataset.name for dataset in self.config.mixture]
        branches: dict[str, tuple[str, int, list[str]]] = {}
        if "joint" in self.config.train.arms:
            branches["joint"] = ("joint", 0, everything)
        for arm in reversed(self._merged_arms):
            groups = self._split_manifest.group_of(arm)
            for group in range(self._split_manifest.groups):
                names = [name for name in everything if groups[name] == group]
                branches[f"{arm}-{group}"] = (arm, group, names)
        return branches

    def _arm_branches(self, arm: str) -> list[str]:
        return [name for name, (owner, _, _) in self._branches.items() if owner == arm]

    def _arm_paths(self, arm: str) -> list[Path]:
        return [self._branch_path(name) for name in self._arm_branches(arm)]

    def _branch_path(self, name: str) -> Path:
        return self.output / "branches" / name

    # ---- fingerprints: the options and inputs of every stage
    @property
    def _sketch_stage(self) -> StageManifest:
        inputs = {"base": self._base_fingerprint, "mixture": self._train_fingerprint}
        return stage_manifest("sketch", self.config.split.sketch_config(), inputs)

    @property
    def _split_stage(self) -> StageManifest:
        return stage_manifest("split", self.config.split, {"sketch": self._sketch_stage.fingerprint})

    def _branch_stage(self, name: str) -> StageManifest:
        arm, group, names = self._branches[name]
        inputs = {"base": self._base_fingerprint, "mixture": self._train_fingerprint}
        return stage_manifest("train", self._train_config, {**inputs, "branch": name, "datasets": "\n".join(names)})

    def _merge_stage(self, arm: str) -> StageManifest:
        inputs = {name: self._branch_stage(name).fingerprint for name in self._arm_branches(arm)}
        if self.config.merge.needs_base or self.config.merge.stats:
            inputs["base"] = self._base_fingerprint
        return stage_manifest("merge", same_bytes(self.config.merge), inputs)

    @property
    def _evaluate_stage(self) -> StageManifest:
        inputs = {arm: self._merge_stage(arm).fingerprint for arm in self._merged_arms}
        inputs |= {name: self._branch_stage(name).fingerprint for name in self._branches}
        inputs["held-out"] = mixture_fingerprint(self.config.mixture, self.config.data, str(self.base), part="eval")
        return stage_manifest("evaluate", self.config.evaluate, inputs)

    @property
    def _report_stage(self) -> StageManifest:
        inputs = {"split": self._split_stage.fingerprint, "evaluate": self._evaluate_stage.fingerprint}
        return stage_manifest("report", self.config.data, inputs)

    @property
    def _train_config(self) -> Any:
        return replace(self.config.train, arms=())  # which other arms run does not change a branch

    @functools.cached_property
    def _base_fingerprint(self) -> str:
        return model_fingerprint(self.base)

    @functools.cached_property
    def _train_fingerprint(self) -> str:
        return mixture_fingerprint(self.config.mixture, self.config.data, str(self.base), part="train")

    # ---- data, loaded once and only when a stage works
    @functools.cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(str(self.base))

    @functools.cached_property
    def _pad_token_id(self) -> int:
        return pad_token_id(self._tokenizer)

    @functools.cached_property
    def _train_data(self) -> list[Dataset]:
        return self._load("train")

    @functools.cached_property
    def _eval_data(self) -> list[Dataset]:
        return self._load("eval")

    def _load(self, part: Any) -> list[Dataset]:
        datasets = load_mixture(self.config.mixture, self._tokenizer, self.config.data, part=part)
        for dataset in datasets:
            for note in dataset.notes:
                self.progress.note(f"{dataset.name} ({part}): {note}")
        if part == "eval" and (absent := len(self.config.mixture) - len(datasets)):
            self.progress.note(f"evaluate: {absent} of {len(self.config.mixture)} datasets have no held-out rows")
        return datasets

    # ---- the rule of every stage
    def _bring_up_to_date(self, path: Path, stage: StageManifest, work: Callable[[Path], None]) -> bool:
        name = str(path.relative_to(self.output))
        recover_directory(path, stage.fingerprint)
        if is_complete(path, stage.fingerprint):
            self.progress.note(f"{name}: up to date")
            return False
        with output_directory(path, stage) as directory:
            work(directory)
            write_run_config(self.config, directory / "config.yml")
        return True

    def _require(self, path: Path, stage: StageManifest) -> None:
        if not is_complete(path, stage.fingerprint):
            state = "was made from another config or input" if path.exists() else "is not there"
            raise MeritFastError(f"{path}: {state}; run first: {self.command.format(stage=stage.stage)}")

    def _notes(self) -> list[str]:
        config = self.config
        return [
            f"model {Path(config.model).name}, {len(config.mixture)} datasets, K = {config.split.groups}",
            f"sketch: {config.split.examples} examples per dataset at the base model, width {config.split.proj_dim}",
            f"training: {config.train.epochs} epoch(s), learning rate {config.train.learning_rate:g}, "
            f"batch {config.train.batch_size}, {config.train.dtype}",
            f"seeds: split {config.split.seed}, train {config.train.seed}; every arm was trained once",
        ]


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
