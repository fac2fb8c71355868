"""Does one unit of a run, by hand or for an executor; the same command may run twice at once."""

import functools
from collections.abc import Callable
from pathlib import Path

from merit_fast.manifests.stages import AUDIT, EVALUATE, MERGE, REPORT, SKETCH, SPLIT, TRAIN
from merit_fast.pipeline.arms import WARMUP
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.run import Run
from merit_fast.pipeline.units.listing import (
    BASE,
    FACTORS,
    Unit,
    is_done,
    is_share,
    list_units,
    unit_named,
)
from merit_fast.pipeline.work import Work


def do_unit(run: Run, name: str) -> bool:
    """Brings one unit up to date; returns whether it had work to do.

    Raises:
        InputError: no unit has this name, or one that it needs is not done.
    """
    units = units_for(run, name)
    unit = unit_named(name, units, run.outputs)
    if unit.name == SPLIT.name:
        return run.split()
    if unit.name == WARMUP:
        return run.warm_up()
    if unit.stage == TRAIN.name:
        return run.train(unit.item)
    work = _work_of(unit, units, run.work, run.outputs)
    return run.bring_up_to_date(unit.path, unit.manifest, work)


def units_for(run: Run, name: str) -> dict[str, Unit]:
    """The run's units, with shares where the unit ``name`` is one or may have some."""
    units = list_units(run.outputs)
    stage = units[name].stage if name in units else ""
    if stage in (SKETCH.name, MERGE.name) or is_share(name):  # only these read rows for shares
        return list_units(run.outputs, run.data.rows)
    return units


def _work_of(
    unit: Unit, units: dict[str, Unit], work: Work, outputs: Outputs
) -> Callable[[Path], None]:
    """The work that fills the unit's output."""
    if unit.name == FACTORS:
        return work.factors
    if unit.stage == SKETCH.name:
        earlier = (unit.path, *finished_parts(unit, units, outputs))
        share = unit.share
        return functools.partial(work.sketch, earlier=earlier, only=unit.item or None, share=share)
    if unit.stage == MERGE.name and unit.share is not None:
        return functools.partial(work.merge_share, name=unit.item, share=unit.share)
    if unit.stage == MERGE.name:
        shares = [units[share].path for share in unit.shares if is_done(units[share], outputs)]
        return functools.partial(work.merge, name=unit.item, shares=shares)
    if unit.name == EVALUATE.name:
        return functools.partial(work.evaluate, measured=finished_parts(unit, units, outputs))
    if unit.stage == EVALUATE.name:
        base = None if unit.name == BASE else units[BASE].path
        return functools.partial(work.evaluate_model, name=unit.item, base=base)
    return {AUDIT.name: work.audit, REPORT.name: work.report}[unit.name]


def finished_parts(unit: Unit, units: dict[str, Unit], outputs: Outputs) -> list[Path]:
    """Outputs of the finished parts of a stage, or shares of a unit."""
    return [units[part].path for part in unit.before if is_done(units[part], outputs)]
