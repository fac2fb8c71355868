"""The states of a run's units, from its files: any machine that sees them can tell."""

from dataclasses import dataclass
from typing import Literal

from merit_fast.data.mixture.select import MixtureRows
from merit_fast.manifests.locks import Owner, owner_of, stage_lock
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.units.journal import History, read_histories
from merit_fast.pipeline.units.listing import Unit, is_done, list_units, missing_units
from merit_fast.units import human_time


@dataclass(frozen=True)
class UnitState:
    """The state of one unit.

    Attributes:
        name: the unit's.
        state: done; not needed, as a part of what is finished or being made; running; ready;
            waiting for others.
        detail: who runs it or has done it, which units it waits for, how often it has failed.
        host: the machine that runs it, or has done it for a driver; "": none, or not known.
        since: local time of that machine at which it started, ISO 8601; "" unless it is running.
        failures: times that it has failed since it last was done.
    """

    name: str
    state: Literal["done", "not needed", "running", "ready", "waiting"]
    detail: str = ""
    host: str = ""
    since: str = ""
    failures: int = 0


def unit_states(outputs: Outputs, rows: MixtureRows | None = None) -> list[UnitState]:
    """The state of every unit that is known now.

    ``rows``: of the run, for the shares; None: without shares.
    """
    units = list_units(outputs, rows)
    missing = missing_units(units, outputs)
    histories = read_histories(outputs.root)
    owners = {name: _owner(units[name], outputs) for name in missing}
    busy = {share for name, owner in owners.items() if owner for share in units[name].shares}
    states = []
    for name, unit in units.items():
        history = histories.get(name, History())
        owner = owners.get(name)
        if owner is not None:
            states.append(_running(name, owner, history))
        elif name not in missing or name in busy:
            states.append(_finished(name, is_done(unit, outputs), history))
        else:
            before = [other for other in unit.before if other in missing]
            states.append(_pending(name, before, history))
    return states


def _owner(unit: Unit, outputs: Outputs) -> Owner | None:
    return owner_of(stage_lock(outputs.root, outputs.records.name(unit.path)))


def _running(name: str, owner: Owner, history: History) -> UnitState:
    detail = _joined(f"on {owner.host} since {owner.started.replace('T', ' ')}", history)
    return UnitState(name, "running", detail, owner.host, owner.started, history.failures)


def _finished(name: str, is_done: bool, history: History) -> UnitState:
    if not is_done:
        return UnitState(name, "not needed")
    if not history.host:
        return UnitState(name, "done")
    return UnitState(
        name, "done", f"in {human_time(history.seconds)} on {history.host}", history.host
    )


def _pending(name: str, before: list[str], history: History) -> UnitState:
    first = ", ".join(before[:3])
    more = f" and {len(before) - 3} more" if len(before) > 3 else ""
    detail = _joined(f"for {first}{more}" if before else "", history)
    state: Literal["waiting", "ready"] = "waiting" if before else "ready"
    return UnitState(name, state, detail, failures=history.failures)


def _joined(text: str, history: History) -> str:
    times = "once" if history.failures == 1 else f"{history.failures} times"
    failed = f"failed {times}" if history.failures else ""
    return ", ".join(part for part in (text, failed) if part)
