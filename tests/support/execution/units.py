"""A run by its units: what is left, what is ready, and the bytes of the results."""

from pathlib import Path

from support.checks import tree_bytes
from support.runs import MEASURED, Notes

from merit_fast.manifests.ledger import UNITS_FOLDER
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run
from merit_fast.pipeline.units.listing import Unit, list_units, missing_units


def run_of(file: Path) -> Run:
    """A fresh object, as in a process of its own."""
    return Run(read_run_config(file), Notes())


def missing(file: Path) -> tuple[dict[str, Unit], dict[str, Unit]]:
    """All units, and those that still have to be done."""
    run = run_of(file)
    units = list_units(run.outputs, run.data.rows)
    return units, missing_units(units, run.outputs)


def ready(file: Path) -> list[str]:
    """Units that can be done now."""
    _, left = missing(file)
    return [name for name, unit in left.items() if not any(n in left for n in unit.before)]


def results(out: Path) -> dict[str, str]:
    """The hash of every result: no parts, no tokens, nothing that holds seconds."""
    files = tree_bytes(out)
    kept = {}
    for name, data in files.items():
        top = str(name).split("/")[0]
        if top in (UNITS_FOLDER, "tokens") or str(name).split("/")[-1] in MEASURED:
            continue
        kept[str(name)] = data
    return kept
