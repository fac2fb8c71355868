"""The units of a run that are known now, each with its output and the units before it.

    warmup -> sketch/DATASET -> sketch -> split -> train/BRANCH -> merge/NAME
    train/BRANCH, merge/NAME, evaluate/base -> evaluate/MODEL -> evaluate -> audit, report

The sketch of a dataset and the measures of a model are parts: they lie in ``units/``, and the
stage's own unit takes them over. The units after the split are known when the split is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from merit_fast.errors import InputError
from merit_fast.manifests.io import StageManifest, stage_manifest
from merit_fast.manifests.ledger import UNITS_FOLDER
from merit_fast.manifests.locks import owner_of, stage_lock
from merit_fast.manifests.stages import (
    AUDIT,
    EVALUATE,
    MERGE,
    REPORT,
    SKETCH,
    SPLIT,
    TRAIN,
)
from merit_fast.pipeline.arms import WARMUP
from merit_fast.pipeline.outputs import Outputs

CONFIG_FILE = "config.yml"  # of every stage's output and of UNITS_FOLDER
BASE = f"{EVALUATE.name}/base"


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    Attributes:
        name: the stage, and what of it: ``train/merit-0``.
        path: its output.
        manifest: stage.json of its output.
        needs: names of the units whose outputs it reads.
    """

    name: str
    path: Path
    manifest: StageManifest
    needs: tuple[str, ...] = ()

    @property
    def stage(self) -> str:
        """The stage's name; the warm-up is of train."""
        return TRAIN.name if self.name == WARMUP else self.name.partition("/")[0]

    @property
    def item(self) -> str:
        """The dataset, branch, merge or model; "" for a unit that is a whole stage."""
        return self.name.partition("/")[2]


def list_units(outputs: Outputs) -> dict[str, Unit]:
    """Units by name, in the order in which one process does them."""
    units = [*_before_split(outputs)]
    if outputs.records.check(outputs.folder(SPLIT), outputs.split.fingerprint).is_current:
        units += _after_split(outputs)
    return {unit.name: unit for unit in units}


def missing_units(units: Mapping[str, Unit], outputs: Outputs) -> dict[str, Unit]:
    """The units that still have to be done: a part of a finished stage is none of them."""
    missing: dict[str, Unit] = {}

    def visit(name: str) -> None:
        unit = units[name]
        if name in missing or is_done(unit, outputs):
            return
        missing[name] = unit
        for need in unit.needs:
            visit(need)

    needed = {need for unit in units.values() for need in unit.needs}
    for name in units.keys() - needed:
        visit(name)
    return {name: unit for name, unit in units.items() if name in missing}


def is_done(unit: Unit, outputs: Outputs) -> bool:
    """Whether the unit's output is finished, undamaged and of this config."""
    return outputs.is_finished(unit.path, unit.manifest)


def unit_named(name: str, units: Mapping[str, Unit], outputs: Outputs) -> Unit:
    """The unit of this name, whose needs are met.

    Raises:
        InputError: there is none, or a unit that it needs is not done.
    """
    if name not in units:
        raise InputError(f"{name}: must be a unit of this run: {', '.join(units)}")
    unit = units[name]
    absent = [need for need in unit.needs if not is_done(units[need], outputs)]
    if absent and not is_done(unit, outputs):
        raise InputError(f"{name}: needs {', '.join(absent)}, which is not done")
    return unit


@dataclass(frozen=True)
class UnitState:
    """The state of one unit.

    Attributes:
        name: the unit's.
        state: done; not needed, as a part of a finished stage; running; ready; waiting for others.
        detail: who runs it, or which units it waits for; "" otherwise.
    """

    name: str
    state: Literal["done", "not needed", "running", "ready", "waiting"]
    detail: str = ""


def unit_states(outputs: Outputs) -> list[UnitState]:
    """The state of every unit that is known now."""
    units = list_units(outputs)
    missing = missing_units(units, outputs)
    states = []
    for name, unit in units.items():
        owner = owner_of(stage_lock(outputs.root, outputs.records.name(unit.path)))
        before = [need for need in unit.needs if need in missing]
        if name not in missing:
            state = UnitState(name, "done" if is_done(unit, outputs) else "not needed")
        elif owner is not None:
            state = UnitState(name, "running", f"by {owner}")
        elif before:
            state = UnitState(name, "waiting", f"for {', '.join(before)}")
        else:
            state = UnitState(name, "ready")
        states.append(state)
    return states


def config_in(root: Path) -> Path:
    """The resolved YAML in a run's output: that of its executor, or of a finished stage.

    Raises:
        InputError: there is none.
    """
    folders = [UNITS_FOLDER, *(stage.folder for stage in (SPLIT, SKETCH, EVALUATE, REPORT))]
    for folder in folders:
        file = root / folder / CONFIG_FILE
        if file.exists():
            return file
    raise InputError(f"{root}: must be the output of a run; it has no {UNITS_FOLDER}/{CONFIG_FILE}")


def _before_split(outputs: Outputs) -> Iterable[Unit]:
    config = outputs.config
    before: tuple[str, ...] = ()
    if config.split.warmup:
        warmup = outputs.warmup
        yield Unit(WARMUP, outputs.branch_path(WARMUP), outputs.branch(warmup))
        before = (WARMUP,)
    whole = outputs.sketch
    parts = []
    if config.split.normalize != "kfac":  # whose factors are of all datasets at once
        for name in outputs.contents:
            path = outputs.root / UNITS_FOLDER / SKETCH.name / name
            inputs = whole.inputs | {"dataset": name}
            manifest = stage_manifest(SKETCH.name, whole.config, inputs)
            parts.append(Unit(f"{SKETCH.name}/{name}", path, manifest, before))
    yield from parts
    needs = tuple(part.name for part in parts)
    yield Unit(SKETCH.name, outputs.folder(SKETCH), whole, needs or before)
    yield Unit(SPLIT.name, outputs.folder(SPLIT), outputs.split, (SKETCH.name,))


def _after_split(outputs: Outputs) -> Iterable[Unit]:
    plan = outputs.plan
    for branch in plan.trained:
        path = outputs.branch_path(branch.name)
        name = f"{TRAIN.name}/{branch.name}"
        yield Unit(name, path, outputs.branch(branch), (SPLIT.name,))
    for merge, branches in plan.merges.items():
        owners = dict.fromkeys(plan.owners[branch] for branch in branches)
        needs = tuple(f"{TRAIN.name}/{owner}" for owner in owners)
        name = f"{MERGE.name}/{merge}"
        yield Unit(name, outputs.merge_path(merge), outputs.merge(merge), needs)
    measured = list(_measured(outputs))
    yield from measured
    of_parts = tuple(unit.name for unit in measured)
    yield Unit(EVALUATE.name, outputs.folder(EVALUATE), outputs.evaluate, of_parts)
    last: tuple[str, ...] = (EVALUATE.name,)
    if outputs.config.evaluate.audit:
        needs = (*(f"{TRAIN.name}/{branch.name}" for branch in plan.trained), *_merges(outputs))
        yield Unit(AUDIT.name, outputs.folder(AUDIT), outputs.audit, needs)
        last = (EVALUATE.name, AUDIT.name)
    yield Unit(REPORT.name, outputs.folder(REPORT), outputs.report, last)


def _merges(outputs: Outputs) -> Iterable[str]:
    return (f"{MERGE.name}/{name}" for name in outputs.plan.first_merges)


def _measured(outputs: Outputs) -> Iterable[Unit]:
    """The measures of the base, of every branch and of every merge."""
    plan = outputs.plan
    whole = outputs.evaluate
    common = {"rows": whole.inputs["held-out"], "arms": whole.inputs["arms"]}
    common |= {"half": whole.inputs.get("rows", ""), "base": outputs.base_fingerprint}

    def measure(name: str, needs: tuple[str, ...], model: str) -> Unit:
        manifest = stage_manifest(EVALUATE.name, whole.config, common | {"model": model})
        return Unit(name, outputs.root / UNITS_FOLDER / name, manifest, needs)

    models: dict[str, tuple[str, str]] = {}  # model -> the unit that makes it, its fingerprint
    for branch in plan.trained:
        models[branch.name] = (f"{TRAIN.name}/{branch.name}", outputs.branch(branch).fingerprint)
    for merge in plan.merges:
        models[merge] = (f"{MERGE.name}/{merge}", outputs.merge(merge).fingerprint)
    yield measure(BASE, (SPLIT.name,), outputs.base_fingerprint)
    for name, (maker, model) in models.items():
        yield measure(f"{EVALUATE.name}/{name}", (maker, BASE), model)
