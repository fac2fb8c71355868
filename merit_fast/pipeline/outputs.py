"""Where every output of a run lies, and the fingerprint that says whether it is up to date.

A stage's fingerprint covers its options and its inputs' fingerprints, so that "up to date" is decided from the config
and the files alone, before anything heavy is imported.
"""

import functools
from dataclasses import replace
from pathlib import Path

from merit_fast.data import mixture_fingerprint
from merit_fast.errors import MeritFastError
from merit_fast.manifests.io import StageManifest, is_complete, read_manifest, stage_manifest
from merit_fast.manifests.schemas import SplitManifest
from merit_fast.merge import method_fingerprint, same_bytes
from merit_fast.model import model_fingerprint, resolve_model, settle_dtype
from merit_fast.pipeline import arms
from merit_fast.pipeline.arms import Branch
from merit_fast.pipeline.config import RunConfig
from merit_fast.train.config import TrainConfig


class Outputs:
    """The outputs of one configured run. ``command`` names, with {stage}, what makes the output of a stage."""

    def __init__(self, config: RunConfig, command: str) -> None:
        self.config, self.command = _settled(config), command
        self.root = Path(config.output)
        self.base = resolve_model(config.model)

    def require(self, path: Path, stage: StageManifest) -> None:
        """Raises MeritFastError if ``path`` does not hold the output that ``stage`` describes."""
        if not is_complete(path, stage.fingerprint):
            state = "was made from another config or input" if path.exists() else "is not there"
            raise MeritFastError(
                f"{path}: {state}; run first: {self.command.format(stage=stage.stage)}"
            )

    # ---- who trains on what, from where
    @functools.cached_property
    def split_manifest(self) -> SplitManifest:
        self.require(self.root / "split", self.split)
        return read_manifest(SplitManifest, self.root / "split" / "split.json")

    @functools.cached_property
    def branches(self) -> dict[str, Branch]:
        return arms.branches(self.config, self.split_manifest)

    def branches_of(self, arm: str) -> list[str]:
        return [name for name, branch in self.branches.items() if branch.arm == arm]

    def branch_path(self, name: str) -> Path:
        return self.root / "branches" / name

    def branch_paths(self, arm: str) -> list[Path]:
        return [self.branch_path(name) for name in self.branches_of(arm)]

    @property
    def start(self) -> Path:
        """Where the gradients are sketched and the branches start: the base, or what the warm-up left."""
        return self.branch_path("warmup") if self.config.split.warmup else self.base

    @property
    def start_fingerprint(self) -> str:
        if self.config.split.warmup:
            return self.branch(arms.warmup_branch(self.config)).fingerprint
        return self.base_fingerprint

    def start_of(self, branch: Branch) -> tuple[Path, str]:
        """Directory and fingerprint of the model that a branch starts from."""
        if branch.arm in ("joint", "warmup"):
            return self.base, self.base_fingerprint
        return self.start, self.start_fingerprint

    # ---- what every stage depends on
    @functools.cached_property
    def base_fingerprint(self) -> str:
        return model_fingerprint(self.base)

    @functools.cached_property
    def train_fingerprint(self) -> str:
        return mixture_fingerprint(
            self.config.mixture, self.config.data, str(self.base), part="train"
        )

    @functools.cached_property
    def held_out_fingerprint(self) -> str:
        return mixture_fingerprint(
            self.config.mixture, self.config.data, str(self.base), part="eval"
        )

    @property
    def sketch(self) -> StageManifest:
        inputs = {"base": self.start_fingerprint, "mixture": self.train_fingerprint}
        return stage_manifest("sketch", self.config.split.sketch_config(), inputs)

    @property
    def split(self) -> StageManifest:
        return stage_manifest("split", self.config.split, {"sketch": self.sketch.fingerprint})

    def branch(self, branch: Branch) -> StageManifest:
        inputs = {"base": self.start_of(branch)[1], "mixture": self.train_fingerprint}
        return stage_manifest("train", self.train_config, inputs | branch.identity(self.config))

    def merge(self, arm: str) -> StageManifest:
        inputs = {
            name: self.branch(self.branches[name]).fingerprint for name in self.branches_of(arm)
        }
        if self.config.merge.needs_base or self.config.merge.stats:
            inputs["base"] = self.start_fingerprint
        if self.config.merge.is_tuned:
            inputs["held-out"] = self.held_out_fingerprint
            inputs["rows per pass"] = str(self.config.evaluate.batch_size)
        inputs |= method_fingerprint(self.config.merge)
        return stage_manifest("merge", same_bytes(self.config.merge), inputs)

    @property
    def evaluate(self) -> StageManifest:
        inputs = {arm: self.merge(arm).fingerprint for arm in arms.merged_arms(self.config)}
        inputs |= {name: self.branch(branch).fingerprint for name, branch in self.branches.items()}
        return stage_manifest(
            "evaluate", self.config.evaluate.without_audit(), inputs | self._reporting_rows
        )

    @property
    def audit(self) -> StageManifest:
        inputs = {arm: self.merge(arm).fingerprint for arm in arms.merged_arms(self.config)}
        return stage_manifest("evaluate", self.config.evaluate, inputs | self._reporting_rows)

    @property
    def _reporting_rows(self) -> dict[str, str]:
        """A merge that is tuned takes half of the held-out rows from what reports."""
        half = {"rows": "the half that reports"} if self.config.merge.is_tuned else {}
        return {"held-out": self.held_out_fingerprint} | half

    @property
    def report(self) -> StageManifest:
        inputs = {"split": self.split.fingerprint, "evaluate": self.evaluate.fingerprint}
        if self.config.evaluate.audit:
            inputs["audit"] = self.audit.fingerprint
        return stage_manifest("report", self.config.data, inputs)

    @property
    def train_config(self) -> TrainConfig:
        return replace(self.config.train, arms=())  # which other arms run does not change a branch


def _settled(config: RunConfig) -> RunConfig:
    """Every dtype "auto" as what it means on this machine, so that outputs say what made them."""
    stages = {name: getattr(config, name) for name in ("split", "train", "evaluate")}
    return replace(
        config, **{name: replace(s, dtype=settle_dtype(s.dtype)) for name, s in stages.items()}
    )  # type: ignore[arg-type]
