"""The command line of a unit, and its result, on whatever machine it runs."""

import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_fast.manifests.stages import TRAIN

_TAIL = 4000  # bytes of a log that are searched for its last line
_LITTLE_SPACE = 1 << 16  # bytes; a disk with less is full


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
        text: the last line that it has added to its log, or why there is none.
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


def ended(command: UnitCommand, code: int, output: bytes, log_start: int = 0) -> Ended:
    """The result of a unit whose process is over; its messages begin at ``log_start``."""
    host = socket.gethostname()
    if code == 0:
        return Ended(command.unit, code, host, "", _answer(output))
    log = Path(command.log)
    text = last_line(log, log_start) if code > 0 else f"was ended by {_signal_name(-code)}"
    if shutil.disk_usage(log.parent).free < _LITTLE_SPACE:
        full = f"no space is left on the disk of {log.parent}"
        text = f"{text}; {full}" if text else full
    return Ended(command.unit, code, host, text)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"


def last_line(log: Path, start: int = 0) -> str:
    """The last line of a log that is not empty, after so many bytes; "" if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - _TAIL))
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
