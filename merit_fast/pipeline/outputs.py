"""Paths of a run's outputs, and the fingerprints that show whether they are current.

A stage's fingerprint covers its options and its inputs. To compare them imports nothing heavy.
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.data import dataset_fingerprints, mixture_fingerprint
from merit_fast.data.config import DataConfig, DatasetConfig, Part
from merit_fast.errors import MeritFastError
from merit_fast.manifests.io import StageManifest, fingerprint, read_manifest, stage_manifest
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
from merit_fast.model import model_fingerprint, resolve_model
from merit_fast.pipeline.arms import WARMUP, Branch, branch_recipe, plan_branches, warmup_branch
from merit_fast.pipeline.config import RunConfig, settle_dtypes
from merit_fast.pipeline.plan import Plan, engine_inputs, make_plan, recorded_recipe, watched_rows
from merit_fast.pipeline.records import Records, sketch_in_force
from merit_fast.pipeline.reporting import audit_options, report_options
from merit_fast.sketch.config import SketchConfig
from merit_fast.train.config import TrainConfig

if TYPE_CHECKING:
    from merit_fast.pipeline.storage.store import OutputStore

_RUN_BY = {stage.name: stage.run_by for stage in (*STAGES, AUDIT)}


class Outputs:
    """The outputs of one configured run.

    ``command`` with {stage} is the command line that error messages name. ``verify``: hash all.
    ``store``: the finished outputs lie there, and the run's folder holds copies.
    """

    def __init__(
        self,
        config: RunConfig,
        command: str,
        verify: bool = False,
        store: "OutputStore | None" = None,
    ) -> None:
        self.config = settle_dtypes(config)
        self.command = command
        self.store = store
        self.root = Path(config.output)
        self.title = store.place.name if store else self.root.name  # the same on every machine
        self.base = resolve_model(config.model)
        self.records = Records(self.root, verify)
        self.shard = config.train.shard  # "auto" until the processes of a training settle it

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

    def is_finished(self, path: Path, manifest: StageManifest) -> bool:
        """Whether the output is finished: in the store if the run has one, else here, undamaged."""
        if self.store:
            return self.store.has(self.records.name(path), manifest.fingerprint)
        return self.records.check(path, manifest.fingerprint).is_current

    def put_in_force(self, again: bool) -> None:
        """Writes the split in force and its branches into the ledger.

        ``again``: also where the ledger has this split already, perhaps with another recipe.
        """
        if again or self.records.ledger().split != self.split.fingerprint:
            plan = self.plan
            members = plan.merges | {name: (name,) for name in plan.single}
            branches = {
                model: [self._in_force(name) for name in names] for model, names in members.items()
            }
            self.records.put_in_force(self.split.fingerprint, branches, self.command)

    def _in_force(self, branch: str) -> tuple[str, str]:
        return self.branch_path(branch).name, self.branch(self.branches[branch]).fingerprint

    # ---- the branches and their starts
    @functools.cached_property
    def split_manifest(self) -> SplitManifest:
        self.require(self.folder(SPLIT), self.split)
        return read_manifest(SplitManifest, self.file(SPLIT))

    @functools.cached_property
    def plan(self) -> Plan:
        """The branches and arms of the split in force."""
        split = self.split_manifest
        branches = list(plan_branches(self.config, split, self.contents))
        fingerprints = {branch.name: self.branch(branch).fingerprint for branch in branches}
        return make_plan(self.config, split, branches, fingerprints)

    @property
    def branches(self) -> dict[str, Branch]:
        return self.plan.branches

    def branch_path(self, name: str) -> Path:
        """The directory of a branch: that of the first branch of the same content."""
        owner = name if name == WARMUP else self.plan.owners[name]
        return self.folder(TRAIN) / owner

    def merge_path(self, name: str) -> Path:
        return self.folder(MERGE) / name

    def merge_inputs(self, name: str) -> list[Path]:
        """Directories of a merge's branches, [K]."""
        return [self.branch_path(branch) for branch in self.plan.merges[name]]

    @property
    def start(self) -> Path:
        """The model whose gradients are sketched and from which the branches start.

        It is the base, or the result of the warm-up.
        """
        return self.branch_path(WARMUP) if self.config.split.warmup else self.base

    @property
    def warmup(self) -> Branch:
        """The joint run before the sketch."""
        return warmup_branch(self.contents)

    @property
    def start_fingerprint(self) -> str:
        if self.config.split.warmup:
            return self.branch(self.warmup).fingerprint
        return self.base_fingerprint

    def start_of(self, branch: Branch) -> tuple[Path, str]:
        """Directory and fingerprint of the model that a branch starts from."""
        if branch.start == "base":
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
    def contents(self) -> dict[str, str]:
        """Name -> fingerprint of each dataset's training examples, in the mixture's order."""
        return dataset_fingerprints(*self._rows, part="train", file_hash=self.records.hashes)

    @functools.cached_property
    def held_out_contents(self) -> dict[str, str]:
        """Name -> fingerprint of each dataset's held-out examples."""
        return dataset_fingerprints(*self._rows, part="eval", file_hash=self.records.hashes)

    @functools.cached_property
    def held_out_fingerprint(self) -> str:
        return self._rows_fingerprint("eval")

    def _rows_fingerprint(self, part: Part) -> str:
        return mixture_fingerprint(*self._rows, part=part, file_hash=self.records.hashes)

    @property
    def _rows(self) -> tuple[tuple[DatasetConfig, ...], DataConfig, str]:
        return self.config.mixture, self.config.data, str(self.base)

    # ---- manifests of the stages
    @property
    def sketch(self) -> StageManifest:
        """The sketch's manifest; a config without a store takes an output that has one more."""
        config = self.config.split.sketch_config()
        here = self.folder(SKETCH)  # a store has an output for each config
        return self._sketch(config) if self.store else sketch_in_force(here, config, self._sketch)

    def _sketch(self, config: SketchConfig) -> StageManifest:
        inputs = {"start": self.start_fingerprint, "mixture": self.train_fingerprint}
        if self.config.train.freeze is not None:
            inputs["freeze"] = fingerprint(self.config.train.freeze)
        optimizer = config.optimizer_hash()
        if optimizer is not None:
            inputs["optimizer"] = optimizer
        if config.store:  # the split takes the sums only
            inputs["sums"] = self._sketch(config.without_store()).fingerprint
        return stage_manifest(SKETCH.name, config, inputs)

    @property
    def split(self) -> StageManifest:
        config = self.config.split.without_store()  # stored rows do not change a split
        sums = self._sketch(config.sketch_config()).fingerprint
        inputs = {"sketch": sums, "controls": str(self.num_controls)}
        return stage_manifest(SPLIT.name, config, inputs)

    @property
    def num_controls(self) -> int:
        """Number of random splits that the split stage looks for."""
        return max(1, self.config.train.controls.random)

    def branch(self, branch: Branch) -> StageManifest:
        """The manifest of a branch: it covers the content, and no name of branch or dataset."""
        _, start = self.start_of(branch)
        recipe = self.recipe(branch)
        inputs = {"start": start, "rows": fingerprint(branch.content(self.config.split))}
        if branch.steps is not None:
            inputs["steps"] = str(branch.steps)
        if recipe.evaluate_steps is not None:
            inputs["held-out"] = watched_rows(branch, self.config, self.held_out_contents)
        inputs |= engine_inputs(recipe)
        return stage_manifest(TRAIN.name, recorded_recipe(recipe), inputs)

    def recipe(self, branch: Branch) -> TrainConfig:
        """Options that decide the branch's training."""
        return branch_recipe(branch, self.config.train)

    def merge(self, name: str) -> StageManifest:
        config = self.config.merge
        inputs = {
            branch: self.branch(self.branches[branch]).fingerprint
            for branch in self.plan.merges[name]
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
        plan = self.plan
        inputs = self._merges_of(plan.merges)
        inputs["arms"] = fingerprint([plan.measured_arms, plan.joint])
        inputs |= {name: self.branch(branch).fingerprint for name, branch in self.branches.items()}
        config = self.config.evaluate.without_audit()
        return stage_manifest(EVALUATE.name, config, inputs | self._reporting_rows)

    @property
    def audit(self) -> StageManifest:
        inputs = self._merges_of(self.plan.first_merges)
        inputs |= {"start": self.start_fingerprint} | self._reporting_rows
        return stage_manifest(AUDIT.name, audit_options(self.config), inputs)

    @property
    def report(self) -> StageManifest:
        """The report of everything that is there: the split, and later results if up to date."""
        inputs = {"split": self.split.fingerprint}
        inputs |= {stage.name: manifest.fingerprint for stage, manifest in self.reported.items()}
        options = report_options(self.config, self.title, self.plan.notes)
        return stage_manifest(REPORT.name, options, inputs)

    @property
    def reported(self) -> dict[Stage, StageManifest]:
        """The results after the split that are up to date, for the report."""
        results = {EVALUATE: self.evaluate}
        if self.config.evaluate.audit:
            results[AUDIT] = self.audit
        return {s: m for s, m in results.items() if self.is_finished(self.folder(s), m)}

    def _merges_of(self, names: Iterable[str]) -> dict[str, str]:
        return {name: self.merge(name).fingerprint for name in names}

    @property
    def _reporting_rows(self) -> dict[str, str]:
        """The held-out rows that report: a tuned merge or an early stop leaves half of them."""
        rows = {"rows": "the half that reports"} if self.config.halves_held_out else {}
        return {"held-out": self.held_out_fingerprint} | rows
