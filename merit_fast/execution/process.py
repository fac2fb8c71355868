"""A unit's process from its start to its end: by itself, by its limit, or by a signal."""

import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

from merit_fast.execution.command import Ended, UnitCommand, ended, last_line
from merit_fast.units import human_time

_LOOK_S = 0.5  # Ray interrupts Python's lines only, no wait that is one line
_CLOSING_LOOK_S = 0.01  # once a unit has closed its output
_STOP_S = 30.0  # that a unit has to end by itself
_LEFT_S = 5.0  # that what a dead unit has left behind has
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


class UnitProcess:
    """A unit that runs here, in a process group of its own.

    The system ends the unit when this process dies, however it dies.

    Args:
        command: of the unit.
        limit_s: seconds after which the unit is ended; None: it may take any time.
    """

    def __init__(self, command: UnitCommand, limit_s: float | None = None) -> None:
        self.command = command
        self._limit_s = limit_s
        self._started = time.monotonic()
        self._signals = [signal.SIGTERM, signal.SIGKILL]  # to come, when the limit is over
        self._last_words = ""
        self._output = b""
        self._log_start = _size(Path(command.log))  # of earlier attempts
        self._process = _started(command)
        assert self._process.stdout is not None
        self._pipe = self._process.stdout
        os.set_blocking(self._pipe.fileno(), False)
        self.is_closed = False  # its output; a child of a dead unit may hold it open

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """The descriptor of its output."""
        return self._pipe.fileno()

    def look(self) -> bool:
        """Reads what the unit has printed and enforces its limit; True when it has ended."""
        has_ended = self._process.poll() is not None
        self._read()
        if not has_ended:
            self._enforce_limit()
        return has_ended

    def result(self) -> Ended:
        """The result of a unit that has ended; ends what it has left behind."""
        self._end_group(_LEFT_S)
        self._pipe.close()
        result = ended(self.command, self._process.returncode, self._output, self._log_start)
        if result.code == 0 or not self._is_late:
            return result
        text = f"took longer than its limit of {human_time(self._limit_s or 0)}"
        if self._last_words:
            text += f", after: {self._last_words}"
        return Ended(result.unit, -signal.SIGTERM, result.host, text)

    def ask_to_end(self) -> None:
        """Sends SIGTERM to the whole group: torchrun's processes too."""
        self._signal(signal.SIGTERM)

    def end(self) -> None:
        """Ends the unit and waits for it."""
        self._end_group(_STOP_S)
        self._process.wait()
        self._pipe.close()

    @property
    def _is_late(self) -> bool:
        return len(self._signals) < 2

    def _read(self) -> None:
        while not self.is_closed:
            try:
                text = os.read(self.fileno(), 1 << 16)
            except BlockingIOError:
                return
            self._output += text
            self.is_closed = not text

    def _enforce_limit(self) -> None:
        if self._limit_s is None or not self._signals:
            return
        end = self._started + self._limit_s + _STOP_S * self._is_late
        if time.monotonic() < end:
            return
        if not self._is_late:
            self._last_words = last_line(Path(self.command.log), self._log_start)
        self._signal(self._signals.pop(0))

    def _signal(self, number: int) -> bool:
        """Signals the group, or with 0 only looks at it; False if nobody of it is left."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _end_group(self, patience_s: float) -> None:
        """SIGTERM for every process of the group, and SIGKILL for those that stay."""
        is_left = self._signal(signal.SIGTERM)
        end = time.monotonic() + patience_s
        while is_left and time.monotonic() < end:
            time.sleep(_CLOSING_LOOK_S)
            self._process.poll()  # else a dead unit counts as one that is left
            self._read()
            is_left = self._signal(0)
        if is_left:
            self._signal(signal.SIGKILL)


def wait_for_one(processes: Collection[UnitProcess]) -> list[UnitProcess]:
    """Waits until one of these units has ended; all that have."""
    while True:
        over = [process for process in processes if process.look()]
        if over:
            return over
        with selectors.DefaultSelector() as selector:
            for process in processes:
                if not process.is_closed:
                    selector.register(process, selectors.EVENT_READ)
            is_ending = any(process.is_closed for process in processes)
            selector.select(_CLOSING_LOOK_S if is_ending else _LOOK_S)


def end_with_parent() -> None:
    """Asks Linux to send SIGTERM to this process when its parent dies."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _started(command: UnitCommand) -> "subprocess.Popen[bytes]":
    log = Path(command.log)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as messages:
        return subprocess.Popen(
            command.words,
            stdout=subprocess.PIPE,
            stderr=messages,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **dict(command.environment)},
            start_new_session=True,
            preexec_fn=end_with_parent,
        )


def run_to_end(command: UnitCommand, limit_s: float | None = None) -> Ended:
    """Runs a unit and waits for it; ends the unit if this process is interrupted."""
    process = UnitProcess(command, limit_s)
    try:
        wait_for_one([process])
    except BaseException:
        process.end()
        raise
    return process.result()
