"""Displays of long-running stages: bars on a terminal, lines in a log, nothing for machines."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Task(Protocol):
    """One bar."""

    def advance(self, amount: float, detail: str = "") -> None: ...


class Progress(Protocol):
    """The display that a stage gets. ``unit`` names the things that ``total`` counts."""

    def task(self, name: str, total: float, unit: str) -> Any: ...

    def note(self, text: str) -> None: ...


class SilentProgress:
    """Shows nothing, for --json and for calls from Python."""

    @contextmanager
    def task(self, name: str, total: float, unit: str) -> Iterator[Task]:
        yield self

    def advance(self, amount: float, detail: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        pass


class PlainProgress:
    """Prints one line on standard error for each finished task, for logs."""

    @contextmanager
    def task(self, name: str, total: float, unit: str) -> Iterator[Task]:
        started = time.monotonic()
        yield SilentProgress()
        seconds = max(time.monotonic() - started, 1e-9)
        rate = total / seconds
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        print(f"{name}: {total:,.0f} {unit} in {seconds:.1f} s, {shown} {unit}/s", file=sys.stderr)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class TerminalProgress:
    """Shows rich bars on standard error and prints notes above them."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    @contextmanager
    def task(self, name: str, total: float, unit: str) -> Iterator[Task]:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[rate]:>22}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        with RichProgress(*columns, console=self.console) as bars:
            yield _RichTask(bars, bars.add_task(name, total=total, rate="", detail=""), unit)

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _RichTask:
    def __init__(self, bars: Any, identifier: Any, unit: str) -> None:
        self.bars = bars
        self.identifier = identifier
        self.unit = unit

    def advance(self, amount: float, detail: str = "") -> None:
        self.bars.advance(self.identifier, amount)
        self.bars.update(
            self.identifier, rate=self._rate(self.bars.tasks[0].speed or 0.0), detail=detail
        )

    def _rate(self, speed: float) -> str:
        if speed >= 1.0 or not speed:
            return f"{speed:,.0f} {self.unit}/s" if speed else ""
        return f"{1 / speed:.1f} s/{self.unit.removesuffix('s')}"
