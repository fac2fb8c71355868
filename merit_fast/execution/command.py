"""One unit as a process: its command line, its log and its result, on whatever machine it runs."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_fast.manifests.stages import TRAIN

_LOOK_S = 0.5
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
_TAIL = 4000  # bytes of a log that are searched for its last line


@dataclass(frozen=True)
class UnitCommand:
    """The command of one unit.

    Attributes:
        unit: its name.
        words: the command line.
        log: file that gets standard error.
        environment: variables that are set for it.
    """

    unit: str
    words: tuple[str, ...]
    log: str
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def is_training(self) -> bool:
        """Whether torchrun may start it as several processes."""
        return is_training(self.unit)


def is_training(unit: str) -> bool:
    """Whether a unit trains a branch."""
    return unit.startswith(f"{TRAIN.name}/")


@dataclass(frozen=True)
class Ended:
    """The end of a unit's process.

    Attributes:
        unit: its name.
        code: exit code; 2: bad input; negative: the number of the signal that killed it.
        host: the machine.
        text: the last line of its log.
        answer: its JSON: worked, seconds, read_bytes, written_bytes, with a store downloaded_bytes
            and uploaded_bytes; empty if it failed.
    """

    unit: str
    code: int
    host: str
    text: str = ""
    answer: Mapping[str, Any] | None = None

    @property
    def is_bad_input(self) -> bool:
        return self.code == 2


def unit_command(
    unit: str,
    config: Path | str,
    log: Path,
    threads: int | None,
    processes: int = 1,
    storage: tuple[str, ...] = (),
) -> UnitCommand:
    """The command that does a unit.

    Args:
        unit: its name.
        config: the run's resolved YAML; in a store its URL.
        log: file for its messages.
        threads: CPU threads of torch; None: as many as torch takes.
        processes: of a training, started by torchrun; other units have one.
        storage: words of the command that name the run's store and the folder for copies.
    """
    python: tuple[str, ...] = (sys.executable,)
    if processes > 1 and is_training(unit):
        count = ("--nproc-per-node", str(processes))
        python += ("-m", "torch.distributed.run", "--standalone", *count)
    words = (*python, "-m", "merit_fast", "unit", str(config), unit, "--json", *storage)
    if threads is not None:
        words += ("--threads", str(threads))
    return UnitCommand(unit, words, str(log))


def start_process(command: UnitCommand) -> "subprocess.Popen[bytes]":
    """Starts a unit in a process group of its own; standard output is a pipe.

    The system ends the unit when this process dies, however it dies.
    """
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
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """Asks Linux for a signal when the parent dies; runs in the child before its program."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def ended(command: UnitCommand, code: int, output: bytes) -> Ended:
    """The result of a unit whose process is over."""
    host = socket.gethostname()
    if code != 0:
        return Ended(command.unit, code, host, last_line(Path(command.log)))
    return Ended(command.unit, code, host, "", _answer(output))


def run_to_end(command: UnitCommand) -> Ended:
    """Runs a unit and waits for it; ends the unit if this process is interrupted."""
    process = start_process(command)
    try:
        output = _output(process)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return ended(command, process.returncode, output)


def _output(process: "subprocess.Popen[bytes]") -> bytes:
    """Standard output to the end; Ray interrupts Python's lines only, no wait that is one line."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=_LOOK_S)[0]


def last_line(log: Path) -> str:
    """The last line of a log that is not empty; "" if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines: Sequence[str] = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _answer(output: bytes) -> Mapping[str, Any]:
    """The JSON object in the last line; empty where the output is something else."""
    lines = output.decode(errors="replace").strip().splitlines()
    try:
        return dict(json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError):
        return {}
