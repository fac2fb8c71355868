"""Displays of long-running stages: bars on a terminal, lines in a log, nothing for machines."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from merit_fast.progress_lines import Meter, bar_line, finished_line, log_line

_LONGEST_SILENCE_S = 30.0  # a log gets a line of every running task at least this often
_SHORTEST_SILENCE_S = 2.0  # and at most this often, so that short tasks print one line
_REDRAWS_PER_S = 5.0


class Task(Protocol):
    """One bar. ``detail`` is a word on the present item, such as its loss."""

    def advance(self, amount: float, detail: str = "") -> None: ...

    def skip(self, amount: float) -> None:
        """Counts work that an earlier run did; it tells nothing about the speed of this one."""


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

    def skip(self, amount: float) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class PlainProgress:
    """Prints lines on standard error, for logs.

    A task prints at every tenth of its total, at least every 30 s (a single step may take longer)
    and when it ends. Notes are printed once.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        longest_silence_s: float = _LONGEST_SILENCE_S,
    ) -> None:
        self.stream = stream
        self.clock = clock
        self.longest_silence_s = longest_silence_s
        self._noted: set[str] = set()

    @contextmanager
    def task(self, name: str, total: float, unit: str) -> Iterator[Task]:
        task = _LogTask(Meter(name, total, unit, self.clock), self._print)
        stop = threading.Event()
        alarm = threading.Thread(target=self._watch, args=(task, stop), daemon=True)
        alarm.start()
        try:
            yield task
        finally:
            stop.set()
            alarm.join()
        self._print(finished_line(task.meter))

    def note(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=self.stream or sys.stderr, flush=True)

    def _watch(self, task: "_LogTask", stop: threading.Event) -> None:
        """Prints lines of a task that is silent for too long; runs in a thread of its own."""
        while not stop.wait(max(0.01, self.longest_silence_s - task.silent_s)):
            if task.silent_s >= self.longest_silence_s:
                task.print()


class _LogTask:
    """A task of a log. Two threads print it: the one that works and the one that watches."""

    def __init__(self, meter: Meter, write: Callable[[str], None]) -> None:
        self.meter = meter
        self.write = write
        self.lock = threading.Lock()
        self.printed_at = meter.started
        self.printed_tenth = 0

    @property
    def silent_s(self) -> float:
        return self.meter.clock() - self.printed_at

    def advance(self, amount: float, detail: str = "") -> None:
        with self.lock:
            self.meter.advance(amount, detail)
            tenth = int(10 * self.meter.share + 1e-9)
            due = self.printed_tenth < tenth < 10 and self.silent_s >= _SHORTEST_SILENCE_S
        if due:
            self.print()

    def skip(self, amount: float) -> None:
        with self.lock:
            self.meter.skip(amount)
            self.printed_tenth = int(10 * self.meter.share + 1e-9)

    def print(self) -> None:
        """Prints the present state."""
        with self.lock:
            self.printed_at = self.meter.clock()
            self.printed_tenth = int(10 * self.meter.share + 1e-9)
            self.write(log_line(self.meter))


class TerminalProgress:
    """Shows bars on standard error and prints notes above them, each note once."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self._noted: set[str] = set()

    @contextmanager
    def task(self, name: str, total: float, unit: str) -> Iterator[Task]:
        from rich.live import Live

        meter = Meter(name, total, unit)
        with Live(_Bar(meter), console=self.console, refresh_per_second=_REDRAWS_PER_S):
            yield meter

    def note(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Bar:
    """The line of a task as rich draws it, for the terminal's present width."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        before, bar, after = bar_line(self.meter, options.max_width, options.ascii_only)
        style = "green" if self.meter.share >= 1.0 else "cyan"
        yield Text.assemble(before, (bar, style), after, no_wrap=True, overflow="ellipsis")
