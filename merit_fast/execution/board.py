"""The board of a run: which units are done, which can start, and which wait for others."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from merit_fast.manifests.locks import owner_of, stage_lock
from merit_fast.manifests.stages import SPLIT
from merit_fast.pipeline.arms import WARMUP
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.units.listing import Unit, is_done, list_units, missing_units

_CHANGES_THE_PLAN = (WARMUP, SPLIT.name)  # units after which others are known


@dataclass(frozen=True)
class Counts:
    """Numbers of units: done, and in all as far as they are known."""

    done: int
    total: int


class Board:
    """The units of a run as its output has them now.

    Args:
        make_data: gives the run's rows and outputs, as its files have them now.
        has_shares: whether several workers may share the work of one unit.
    """

    def __init__(self, make_data: Callable[[], RunData], has_shares: bool = False) -> None:
        self._make_data = make_data
        self._has_shares = has_shares
        self._data = make_data()
        self.units: dict[str, Unit] = {}
        self.missing: dict[str, Unit] = {}
        self.refresh()

    @property
    def outputs(self) -> Outputs:
        return self._data.outputs

    def refresh(self, ended: str | None = None) -> None:
        """Looks at the outputs again, after the unit ``ended``."""
        if ended in _CHANGES_THE_PLAN:
            self._data = self._make_data()
        self._look()
        self.units = list_units(self.outputs, self._data.rows if self._has_shares else None)
        self.missing = missing_units(self.units, self.outputs)

    def is_done(self, name: str) -> bool:
        """Whether the output of a unit is finished, by its files."""
        self._look()
        return is_done(self.units[name], self.outputs)

    def host(self, name: str) -> str:
        """The machine whose process holds the lock of a unit's output; "" while none does."""
        records = self.outputs.records
        owner = owner_of(stage_lock(self.outputs.root, records.name(self.units[name].path)))
        return "" if owner is None else owner.host

    def ready(self, running: Iterable[str]) -> list[str]:
        """Units whose needs are met and that do not run, in the order of the list."""
        busy = set(running)
        return [
            name
            for name, unit in self.missing.items()
            if name not in busy and not any(other in self.missing for other in unit.before)
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
            self._data = self._make_data()

    @property
    def counts(self) -> Counts:
        return Counts(len(self.units) - len(self.missing), len(self.units))
