"""Machines that share nothing but a store, and what a store of theirs holds."""

from pathlib import Path
from typing import Any

from support.merge.stores import NUMBERS
from support.runs import Notes

from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run
from merit_fast.pipeline.storage.place import list_objects, open_place
from merit_fast.pipeline.storage.store import OutputStore
from merit_fast.pipeline.units.listing import list_units, missing_units
from merit_fast.pipeline.units.stored import take_plan
from merit_fast.records import replace

WEIGHTS = 300_000  # bytes; a model of these tests has more


def machine(folder: Path, finished_run: Any, storage: str) -> Run:
    """A run as a fresh process on a machine has it; ``folder`` is that machine's disk."""
    folder.mkdir(exist_ok=True)
    config = read_run_config(finished_run.copy_config(folder))
    config = replace(config, output=str(folder / f"scratch-of-{folder.name}"))
    return Run(config, Notes(), store=OutputStore(open_place(storage)))


def ready(run: Run) -> list[str]:
    """Units that can start, by the run's store."""
    take_plan(run)
    units = list_units(run.outputs)
    left = missing_units(units, run.outputs)
    return [name for name, unit in left.items() if not any(n in left for n in unit.needs)]


def forget(storage: str, name: str) -> None:
    """Removes a unit's output, as if the unit had never been done."""
    place = open_place(storage)
    for path in list_objects(place):
        if path.startswith((f"finished/{name}/", f"outputs/{name}/")):
            place.store.rm_file((place / path).path)


def copy_of(storage: str, target: str = "") -> str:
    """Another store with the same objects and name; ``target``: its place."""
    source = open_place(storage)
    copy = open_place(target or f"memory://copy-{next(NUMBERS)}/{source.name}")
    for path in list_objects(source):
        copy.store.pipe_file((copy / path).path, source.store.cat_file((source / path).path))
    return str(copy)
