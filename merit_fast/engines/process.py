"""Runs a stack's command in a process of its own, and ends it with this one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from merit_fast.errors import InputError, MeritFastError

_GRACE_S = 20.0  # for a stack that is asked to end
_SHOWN_LINES = 5
_SHOWN_WIDTH = 200
_TAIL_BYTES = 64 << 10
_LOCK_FILE = "engine.lock"
_BAR = re.compile(r"\d%\|")


@contextlib.contextmanager
def only_stack(folder: Path) -> Iterator[int]:
    """Yields the descriptor of a lock on ``folder`` that a stack inherits.

    A merit-fast that is killed leaves its stack behind, and two that write one folder spoil its
    checkpoints. The kernel frees the lock when the last of both ends.

    Raises:
        MeritFastError: the stack of an earlier call still runs.
    """
    descriptor = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = os.read(descriptor, 20).decode() or "of an earlier call"
            raise MeritFastError(
                f"{folder}: process {number} still trains here; wait for it, or end it"
            ) from None
        os.ftruncate(descriptor, 0)
        yield descriptor
    finally:
        os.close(descriptor)


def run_logged(command: Sequence[str], log: Path, lock: int) -> int:
    """Runs the command to its end; its output goes to ``log``.

    An interruption of this process ends the command and its children first.

    Args:
        command: the words of the command.
        log: file for its output; one that is there is replaced.
        lock: descriptor of ``only_stack``, which gets the command's process number.

    Returns:
        its exit code; negative: the signal that ended it.

    Raises:
        InputError: the program is not there.
    """
    with open(log, "wb") as stream:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
            )
        except OSError as error:
            raise InputError(f"train: {command[0]}: cannot be started: {error.strerror}") from None
        try:
            os.pwrite(lock, str(process.pid).encode(), 0)
            return process.wait()
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the command's whole session: politely first."""
    for number, patience in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def last_lines(log: Path) -> list[str]:
    """The last lines of a log that hold text; progress bars do not count."""
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = stream.read().decode("utf-8", "replace")
    lines = [line.rpartition("\r")[2].strip() for line in text.rstrip().split("\n")]
    kept = [line[-_SHOWN_WIDTH:] for line in lines if line and not _BAR.search(line)]
    return kept[-_SHOWN_LINES:]
