"""The table of a driven run on a terminal: counts of every kind of unit, and the units that run."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from merit_fast.execution.board import Board
from merit_fast.progress import Progress, TerminalProgress
from merit_fast.units import human_time

if TYPE_CHECKING:
    from rich.table import Table

_REDRAWS_PER_S = 2.0
_HEADINGS = ("unit", "state", "where", "time")


class Driven(Protocol):
    """The driver whose units are shown."""

    board: Board
    running: dict[str, float]  # unit -> its start, by ``time.monotonic``
    failures: dict[str, int]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    unit: str
    state: str
    where: str = ""
    time: str = ""


class View:
    """Rows of a driver's units as they are now, which rich draws in a thread of its own."""

    def __init__(self, driver: Driven) -> None:
        self.driver = driver
        self._hosts: dict[tuple[str, float], str] = {}  # a unit and its start -> machine

    def rows(self, now: float) -> list[Row]:
        """A row for every kind of unit, and below it one for each that runs; ``now``: seconds."""
        board = self.driver.board
        running = dict(self.driver.running)
        rows = []
        for kind in dict.fromkeys(map(_kind, board.units)):
            names = [name for name in board.units if _kind(name) == kind]
            rows.append(Row(kind, self._counts(names, running)))
            rows += [self._row(name, running[name], now) for name in names if name in running]
        return rows

    def _counts(self, names: Sequence[str], running: dict[str, float]) -> str:
        missing = [name for name in names if name in self.driver.board.missing]
        busy = sum(name in running for name in missing)
        text = f"{len(names) - len(missing)} of {len(names)} done"
        return f"{text}, {busy} running" if busy else text

    def _row(self, name: str, started: float, now: float) -> Row:
        failures = self.driver.failures.get(name, 0)
        again = f", failed {failures}x" if failures else ""
        host = self._hosts.get((name, started), "")
        if not host:
            host = self._hosts[name, started] = self.driver.board.host(name)
        return Row(f"  {name}", f"running{again}", host, human_time(now - started))

    def __rich_console__(self, console: Any, options: Any) -> Iterator["Table"]:
        from rich.table import Table

        table = Table(*_HEADINGS, box=None, pad_edge=False, show_edge=False)
        rows = self.rows(time.monotonic())
        shown = rows[: max(1, options.size.height - 3)]  # a taller table could not be redrawn
        for row in shown:
            table.add_row(row.unit, row.state, row.where, row.time)
        if len(shown) < len(rows):
            table.add_row(f"  and {len(rows) - len(shown)} more lines", "")
        yield table


def has_table(progress: Progress) -> bool:
    """Whether the display draws a table; others print a line for every unit."""
    return isinstance(progress, TerminalProgress)


@contextmanager
def shown(view: View, progress: Progress) -> Iterator[None]:
    """Draws the table on a terminal until the end; notes appear above it."""
    if not isinstance(progress, TerminalProgress):
        yield
        return
    from rich.live import Live

    with Live(view, console=progress.console, refresh_per_second=_REDRAWS_PER_S):
        yield


def _kind(name: str) -> str:
    """The first word of a unit's name."""
    return name.partition("/")[0]
