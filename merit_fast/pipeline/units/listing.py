"""The units of a run that are known now, each with its output and the units before it.

    warmup -> factors -> sketch/DATASET -> sketch -> split -> train/BRANCH -> merge/NAME
    train/BRANCH, merge/NAME, evaluate/base -> evaluate/MODEL -> evaluate -> audit, report
    sketch/DATASET/i-of-n -> sketch/DATASET, merge/NAME/i-of-n -> merge/NAME

K-FAC's factors, the sketch of a dataset and the measures of a model are parts: they lie in
``units/``, and the stage's own unit takes them over. Shares (i of n) are parts of a unit's work,
which does itself whatever no share has done. The units after the split are known when the split is.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from merit_fast.data.mixture.select import MixtureRows
from merit_fast.errors import InputError
from merit_fast.manifests.directories import has_whole_files
from merit_fast.manifests.io import StageManifest, stage_manifest
from merit_fast.manifests.ledger import UNITS_FOLDER
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
from merit_fast.pipeline.units.sharing import merge_shares, sketch_shares

CONFIG_FILE = "config.yml"  # of every stage's output and of UNITS_FOLDER
BASE = f"{EVALUATE.name}/base"
FACTORS = "factors"
_SHARES = "shares"  # in UNITS_FOLDER


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    Attributes:
        name: the stage, and what of it: ``train/merit-0``.
        path: its output.
        manifest: stage.json of its output.
        needs: names of the units whose outputs it reads.
        shares: names of the units that can do its work before it; it does what they have not done.
        share: (i, n) of a share; None: it is none.
        is_proved_later: whether the unit that takes its files over compares them with their hashes.
    """

    name: str
    path: Path
    manifest: StageManifest
    needs: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    share: tuple[int, int] | None = None
    is_proved_later: bool = False

    @property
    def stage(self) -> str:
        """The stage's name; the warm-up is of train, the factors are of the sketch."""
        return self.manifest.stage

    @property
    def item(self) -> str:
        """The dataset, branch, merge or model; "" for a unit that is a whole stage."""
        item = self.name.partition("/")[2]
        return item if self.share is None else item.rpartition("/")[0]

    @property
    def before(self) -> tuple[str, ...]:
        """Names of the units that come before it in a driven run."""
        return (*self.needs, *self.shares)


def list_units(outputs: Outputs, rows: MixtureRows | None = None) -> dict[str, Unit]:
    """Units by name, in the order in which one process does them.

    ``rows``: of the run, which decide the shares; None: without shares.
    """
    units = [*_before_split(outputs, rows)]
    if outputs.records.check(outputs.folder(SPLIT), outputs.split.fingerprint).is_current:
        units += _after_split(outputs, has_shares=rows is not None)
    return {unit.name: unit for unit in units}


def missing_units(units: Mapping[str, Unit], outputs: Outputs) -> dict[str, Unit]:
    """The units that still have to be done: a part of a finished stage is none of them."""
    missing: dict[str, Unit] = {}

    def visit(name: str) -> None:
        unit = units[name]
        if name in missing or is_done(unit, outputs):
            return
        missing[name] = unit
        for need in unit.before:
            visit(need)

    needed = {need for unit in units.values() for need in unit.before}
    for name in units.keys() - needed:
        visit(name)
    return {name: unit for name, unit in units.items() if name in missing}


def is_done(unit: Unit, outputs: Outputs) -> bool:
    """Whether the unit's output is finished, undamaged and of this config."""
    if unit.is_proved_later and outputs.store is None:
        return has_whole_files(unit.path, unit.manifest.fingerprint)
    return outputs.is_finished(unit.path, unit.manifest)


def is_share(name: str) -> bool:
    """Whether a unit's name has the form of a share's."""
    return re.search(r"/\d+-of-\d+$", name) is not None


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


def _before_split(outputs: Outputs, rows: MixtureRows | None) -> Iterable[Unit]:
    config = outputs.config
    before: tuple[str, ...] = ()
    if config.split.warmup:
        warmup = outputs.warmup
        yield Unit(WARMUP, outputs.branch_path(WARMUP), outputs.branch(warmup))
        before = (WARMUP,)
    whole = outputs.sketch
    if config.split.normalize == "kfac":
        path = outputs.root / UNITS_FOLDER / FACTORS
        manifest = stage_manifest(SKETCH.name, whole.config, whole.inputs | {"part": FACTORS})
        yield Unit(FACTORS, path, manifest, before, is_proved_later=True)
        before = (FACTORS,)
    shares = {} if rows is None else sketch_shares(config.split, rows)
    parts = []
    for name in outputs.contents:
        path = outputs.root / UNITS_FOLDER / SKETCH.name / name
        manifest = stage_manifest(SKETCH.name, whole.config, whole.inputs | {"dataset": name})
        part = Unit(f"{SKETCH.name}/{name}", path, manifest, before)
        cut = _shares_of(part, outputs, shares.get(name, 1))
        yield from cut
        yield _with_shares(part, cut)
        parts.append(part.name)
    yield Unit(SKETCH.name, outputs.folder(SKETCH), whole, (*before, *parts))
    yield Unit(SPLIT.name, outputs.folder(SPLIT), outputs.split, (SKETCH.name,))


def _shares_of(unit: Unit, outputs: Outputs, count: int) -> list[Unit]:
    """The shares of a unit's work; none where there would be one only."""
    shares = []
    for number in range(1, count + 1) if count > 1 else ():
        share = f"{number}-of-{count}"
        manifest = stage_manifest(
            unit.stage, unit.manifest.config, {"of": unit.manifest.fingerprint, "share": share}
        )
        name = f"{unit.name}/{share}"
        path = outputs.root / UNITS_FOLDER / _SHARES / name
        shares.append(Unit(name, path, manifest, unit.needs, (), (number, count), True))
    return shares


def _with_shares(unit: Unit, shares: Iterable[Unit]) -> Unit:
    return replace(unit, shares=tuple(share.name for share in shares))


def _after_split(outputs: Outputs, has_shares: bool) -> Iterable[Unit]:
    plan = outputs.plan
    count = merge_shares(outputs) if has_shares else 1
    for branch in plan.trained:
        path = outputs.branch_path(branch.name)
        name = f"{TRAIN.name}/{branch.name}"
        yield Unit(name, path, outputs.branch(branch), (SPLIT.name,))
    for merge, branches in plan.merges.items():
        owners = dict.fromkeys(plan.owners[branch] for branch in branches)
        needs = tuple(f"{TRAIN.name}/{owner}" for owner in owners)
        name = f"{MERGE.name}/{merge}"
        unit = Unit(name, outputs.merge_path(merge), outputs.merge(merge), needs)
        cut = _shares_of(unit, outputs, count)
        yield from cut
        yield _with_shares(unit, cut)
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
