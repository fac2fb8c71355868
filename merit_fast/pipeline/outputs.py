"""Paths of a run's outputs, and the fingerprints that show whether they are current.

A stage's fingerprint covers its options and its inputs' fingerprints. So the config and the files
decide which stages have work to do, before anything heavy is imported.
"""

import functools
from dataclasses import replace
from pathlib import Path

from merit_fast.data import mixture_fingerprint
from merit_fast.errors import MeritFastError
from merit_fast.manifests.directories import is_complete
from merit_fast.manifests.io import StageManifest, read_manifest, stage_manifest
from merit_fast.manifests.schemas import SplitManifest
from merit_fast.manifests.stages import (
    AUDIT,
    EVALUATE,
    MERGE,
    REPORT,
    SKETCH,
    SPLIT,
    STAGES,
    TRAIN,
    Stage,
)
from merit_fast.merge import method_fingerprint, same_bytes
from merit_fast.model import model_fingerprint, resolve_model, settle_dtype
from merit_fast.pipeline.arms import Branch, merged_arms, plan_branches, warmup_branch
from merit_fast.pipeline.config import RunConfig
from merit_fast.pipeline.reporting import audit_options, report_options
from merit_fast.train.config import TrainConfig

_RUN_BY = {stage.name: stage.run_by for stage in (*STAGES, AUDIT)}


class Outputs:
    """The outputs of one configured run.

    ``command`` with {stage} is the command line that error messages name.
    """

    def __init__(self, config: RunConfig, command: str) -> None:
        self.config = _settle_dtypes(config)
        self.command = command
        self.root = Path(config.output)
        self.base = resolve_model(config.model)

    def folder(self, stage: Stage) -> Path:
        """The folder of a stage's output."""
        return self.root / stage.folder

    def file(self, stage: Stage) -> Path:
        """The main file of a stage that has one."""
        return self.folder(stage) / stage.file

    def require(self, path: Path, manifest: StageManifest) -> None:
        """Checks that ``path`` holds the output of exactly this stage, config and inputs.

        Raises:
            MeritFastError: it does not; names the command that makes it.
        """
        if not is_complete(path, manifest.fingerprint):
            state = "was made from another config or input" if path.exists() else "is not there"
            command = self.command.format(stage=_RUN_BY[manifest.stage])
            raise MeritFastError(f"{path}: {state}; run first: {command}")

    # ---- the branches and their starts
    @functools.cached_property
    def split_manifest(self) -> SplitManifest:
        self.require(self.folder(SPLIT), self.split)
        return read_manifest(SplitManifest, self.file(SPLIT))

    @functools.cached_property
    def branches(self) -> dict[str, Branch]:
        return plan_branches(self.config, self.split_manifest)

    def branches_of(self, arm: str) -> list[str]:
        return [name for name, branch in self.branches.items() if branch.arm == arm]

    def branch_path(self, name: str) -> Path:
        return self.folder(TRAIN) / name

    def branch_paths(self, arm: str) -> list[Path]:
        return [self.branch_path(name) for name in self.branches_of(arm)]

    def merge_path(self, arm: str) -> Path:
        return self.folder(MERGE) / arm

    @property
    def start(self) -> Path:
        """The model whose gradients are sketched and from which the branches start.

        It is the base, or the result of the warm-up.
        """
        return self.branch_path("warmup") if self.config.split.warmup else self.base

    @property
    def start_fingerprint(self) -> str:
        if self.config.split.warmup:
            return self.branch(warmup_branch(self.config)).fingerprint
        return self.base_fingerprint

    def start_of(self, branch: Branch) -> tuple[Path, str]:
        """Directory and fingerprint of the model that a branch starts from."""
        if branch.arm in ("joint", "warmup"):
            return self.base, self.base_fingerprint
        return self.start, self.start_fingerprint

    # ---- fingerprints of the inputs
    @functools.cached_property
    def base_fingerprint(self) -> str:
        return model_fingerprint(self.base)

    @functools.cached_property
    def train_fingerprint(self) -> str:
        config = self.config
        return mixture_fingerprint(config.mixture, config.data, str(self.base), part="train")

    @functools.cached_property
    def held_out_fingerprint(self) -> str:
        config = self.config
        return mixture_fingerprint(config.mixture, config.data, str(self.base), part="eval")

    # ---- manifests of the stages
    @property
    def sketch(self) -> StageManifest:
        inputs = {"start": self.start_fingerprint, "mixture": self.train_fingerprint}
        return stage_manifest(SKETCH.name, self.config.split.sketch_config(), inputs)

    @property
    def split(self) -> StageManifest:
        inputs = {"sketch": self.sketch.fingerprint}
        return stage_manifest(SPLIT.name, self.config.split, inputs)

    def branch(self, branch: Branch) -> StageManifest:
        _, start = self.start_of(branch)
        inputs = {"start": start, "mixture": self.train_fingerprint}
        return stage_manifest(TRAIN.name, self.train_config, inputs | branch.identity(self.config))

    def merge(self, arm: str) -> StageManifest:
        config = self.config.merge
        inputs = {
            name: self.branch(self.branches[name]).fingerprint for name in self.branches_of(arm)
        }
        if config.needs_base or config.stats:
            inputs["start"] = self.start_fingerprint
        if config.is_tuned:
            inputs["held-out"] = self.held_out_fingerprint
            inputs["rows per pass"] = str(self.config.evaluate.batch_size)
        inputs |= method_fingerprint(config)
        return stage_manifest(MERGE.name, same_bytes(config), inputs)

    @property
    def evaluate(self) -> StageManifest:
        inputs = self._merges
        inputs |= {name: self.branch(branch).fingerprint for name, branch in self.branches.items()}
        config = self.config.evaluate.without_audit()
        return stage_manifest(EVALUATE.name, config, inputs | self._reporting_rows)

    @property
    def audit(self) -> StageManifest:
        inputs = self._merges | {"start": self.start_fingerprint} | self._reporting_rows
        return stage_manifest(AUDIT.name, audit_options(self.config), inputs)

    @property
    def report(self) -> StageManifest:
        """The report of everything that is there: the split, and later results if up to date."""
        inputs = {"split": self.split.fingerprint}
        inputs |= {stage.name: manifest.fingerprint for stage, manifest in self.reported.items()}
        return stage_manifest(REPORT.name, report_options(self.config), inputs)

    @property
    def reported(self) -> dict[Stage, StageManifest]:
        """The results after the split that are up to date, for the report."""
        results = {EVALUATE: self.evaluate}
        if self.config.evaluate.audit:
            results[AUDIT] = self.audit
        return {
            stage: manifest
            for stage, manifest in results.items()
            if is_complete(self.folder(stage), manifest.fingerprint)
        }

    @property
    def _merges(self) -> dict[str, str]:
        return {arm: self.merge(arm).fingerprint for arm in merged_arms(self.config)}

    @property
    def _reporting_rows(self) -> dict[str, str]:
        """The held-out rows that report: a tuned merge leaves half of them."""
        half = {"rows": "the half that reports"} if self.config.merge.is_tuned else {}
        return {"held-out": self.held_out_fingerprint} | half

    @property
    def train_config(self) -> TrainConfig:
        return replace(self.config.train, arms=())  # the list of arms does not change a branch


def _settle_dtypes(config: RunConfig) -> RunConfig:
    """Replaces every dtype "auto" by this machine's choice, so that outputs name the dtype used."""
    return replace(
        config,
        split=replace(config.split, dtype=settle_dtype(config.split.dtype)),
        train=replace(config.train, dtype=settle_dtype(config.train.dtype)),
        evaluate=replace(config.evaluate, dtype=settle_dtype(config.evaluate.dtype)),
    )
