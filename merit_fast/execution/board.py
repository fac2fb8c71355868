"""The board of a run: which units are done, which can start, and which wait for others."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from merit_fast.manifests.stages import SPLIT
from merit_fast.pipeline.arms import WARMUP
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.units.listing import Unit, is_done, list_units, missing_units

_CHANGES_THE_PLAN = (WARMUP, SPLIT.name)  # units after which others are known


@dataclass(frozen=True)
class Counts:
    """Numbers of units: done, and in all as far as they are known."""

    done: int
    total: int


class Board:
    """The units of a run as its output has them now."""

    def __init__(self, make_outputs: Callable[[], Outputs]) -> None:
        self._make_outputs = make_outputs
        self.outputs = make_outputs()
        self.units: dict[str, Unit] = {}
        self.missing: dict[str, Unit] = {}
        self.refresh()

    def refresh(self, ended: str | None = None) -> None:
        """Looks at the outputs again, after the unit ``ended``."""
        if ended in _CHANGES_THE_PLAN:
            self.outputs = self._make_outputs()
        self._look()
        self.units = list_units(self.outputs)
        self.missing = missing_units(self.units, self.outputs)

    def is_done(self, name: str) -> bool:
        """Whether the output of a unit is finished, by its files."""
        self._look()
        return is_done(self.units[name], self.outputs)

    def ready(self, running: Iterable[str]) -> list[str]:
        """Units whose needs are met and that do not run, in the order of the list."""
        busy = set(running)
        return [
            name
            for name, unit in self.missing.items()
            if name not in busy and not any(need in self.missing for need in unit.needs)
        ]

    def _look(self) -> None:
        """Asks the run's store, if it has one, which outputs are finished now.

        Another driver may have finished the split, which is then copied.
        """
        outputs = self.outputs
        if outputs.store is None:
            return
        outputs.store.look()
        folder = outputs.folder(SPLIT)
        is_here = outputs.records.check(folder, outputs.split.fingerprint).is_current
        if not is_here and outputs.is_finished(folder, outputs.split):
            self.outputs = self._make_outputs()

    @property
    def counts(self) -> Counts:
        return Counts(len(self.units) - len(self.missing), len(self.units))
