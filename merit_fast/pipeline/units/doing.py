"""Does one unit of a run, by hand or for an executor; the same command may run twice at once."""

import functools
from collections.abc import Callable
from pathlib import Path

from merit_fast.manifests.stages import AUDIT, EVALUATE, MERGE, REPORT, SKETCH, SPLIT, TRAIN
from merit_fast.pipeline.arms import WARMUP
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.run import Run
from merit_fast.pipeline.units.listing import BASE, Unit, is_done, list_units, unit_named
from merit_fast.pipeline.work import Work


def do_unit(run: Run, name: str) -> bool:
    """Brings one unit up to date; returns whether it had work to do.

    Raises:
        InputError: no unit has this name, or one that it needs is not done.
    """
    units = list_units(run.outputs)
    unit = unit_named(name, units, run.outputs)
    if unit.name == SPLIT.name:
        return run.split()
    if unit.name == WARMUP:
        return run.warm_up()
    if unit.stage == TRAIN.name:
        return run.train(unit.item)
    work = _work_of(unit, units, run.work, run.outputs)
    return run.bring_up_to_date(unit.path, unit.manifest, work)


def _work_of(
    unit: Unit, units: dict[str, Unit], work: Work, outputs: Outputs
) -> Callable[[Path], None]:
    """The work that fills the unit's output."""
    if unit.stage == SKETCH.name and unit.item:
        return functools.partial(work.sketch, only=unit.item)
    if unit.name == SKETCH.name:
        return functools.partial(work.sketch, earlier=finished_parts(unit, units, outputs))
    if unit.stage == MERGE.name:
        return functools.partial(work.merge, name=unit.item)
    if unit.name == EVALUATE.name:
        return functools.partial(work.evaluate, measured=finished_parts(unit, units, outputs))
    if unit.stage == EVALUATE.name:
        base = None if unit.name == BASE else units[BASE].path
        return functools.partial(work.evaluate_model, name=unit.item, base=base)
    return {AUDIT.name: work.audit, REPORT.name: work.report}[unit.name]


def finished_parts(unit: Unit, units: dict[str, Unit], outputs: Outputs) -> list[Path]:
    """Outputs of the finished parts of a stage."""
    return [units[need].path for need in unit.needs if is_done(units[need], outputs)]
