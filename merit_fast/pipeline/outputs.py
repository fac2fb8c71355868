"""Paths of a run's outputs, and the fingerprints that show whether they are current.

A stage's fingerprint covers its options and its inputs' fingerprints. So the config and the files
decide which stages have work to do, before anything heavy is imported.
"""

import functools
from dataclasses import replace
from pathlib import Path

from merit_fast.data import mixture_fingerprint
from merit_fast.data.config import Part
from merit_fast.errors import MeritFastError
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
from merit_fast.pipeline.records import Records
from merit_fast.pipeline.reporting import audit_options, report_options
from merit_fast.train.config import TrainConfig

_RUN_BY = {stage.name: stage.run_by for stage in (*STAGES, AUDIT)}


class Outputs:
    """The outputs of one configured run.

    ``command`` with {stage} is the command line that error messages name. ``verify``: hash every
    file of every output and input.
    """

    def __init__(self, config: RunConfig, command: str, verify: bool = False) -> None:
        self.config = _settle_dtypes(config)
        self.command = command
        self.root = Path(config.output)
        self.base = resolve_model(config.model)
        self.records = Records(self.root, verify)

    def folder(self, stage: Stage) -> Path:
        """The folder of a stage's output."""
        return self.root / stage.folder

    def file(self, stage: Stage) -> Path:
        """The main file of a stage that has one."""
        return self.folder(stage) / stage.file

    def require(self, path: Path, manifest: StageManifest) -> None:
        """Checks that ``path`` holds the undamaged output of this stage, config and inputs.

        Raises:
            MeritFastError: it does not; names the damage and the command that makes it.
        """
        state = self.records.check(path, manifest.fingerprint)
        if state.is_current:
            return
        found = {
            "absent": f"{path}: is not there",
            "other config": f"{path}: was made from another config or input",
            "damaged": f"{self.root}/{state.detail}",
            "foreign": state.detail,
        }[state.state]
        command = self.command.format(stage=_RUN_BY[manifest.stage])
        raise MeritFastError(f"{found}; run first: {command}")

    def expected(self) -> dict[Path, StageManifest]:
        """Every output by its path; those after the split only if the split is up to date."""
        expected = {self.folder(SKETCH): self.sketch, self.folder(SPLIT): self.split}
        if self.config.split.warmup:
            warmup = self.branch(warmup_branch(self.config))
            expected = {self.branch_path("warmup"): warmup, **expected}
        if not self.records.check(self.folder(SPLIT), self.split.fingerprint).is_current:
            return expected
        for name, branch in self.branches.items():
            expected[self.branch_path(name)] = self.branch(branch)
        for arm in merged_arms(self.config):
            expected[self.merge_path(arm)] = self.merge(arm)
        expected[self.folder(EVALUATE)] = self.evaluate
        if self.config.evaluate.audit:
            expected[self.folder(AUDIT)] = self.audit
        expected[self.folder(REPORT)] = self.report
        return expected

    def put_in_force(self, again: bool) -> None:
        """Writes the split in force and its branches into the ledger.

        ``again``: also where the ledger has this split already, perhaps with another recipe.
        """
        if again or self.records.ledger().split != self.split.fingerprint:
            branches: dict[str, list[tuple[str, str]]] = {}
            for name, branch in self.branches.items():
                pair = (self.branch_path(name).name, self.branch(branch).fingerprint)
                branches.setdefault(branch.arm, []).append(pair)
            self.records.put_in_force(self.split.fingerprint, branches, self.command)

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
        return model_fingerprint(self.base, self.records.hashes)

    @functools.cached_property
    def train_fingerprint(self) -> str:
        return self._rows_fingerprint("train")

    @functools.cached_property
    def held_out_fingerprint(self) -> str:
        return self._rows_fingerprint("eval")

    def _rows_fingerprint(self, part: Part) -> str:
        config = self.config
        base = str(self.base)
        hashes = self.records.hashes
        return mixture_fingerprint(config.mixture, config.data, base, part=part, file_hash=hashes)

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
        inputs = {"split": self.split.fingerprint, "evaluate": self.evaluate.fingerprint}
        if self.config.evaluate.audit:
            inputs["audit"] = self.audit.fingerprint
        return stage_manifest(REPORT.name, report_options(self.config), inputs)

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
