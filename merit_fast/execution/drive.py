"""Drives a run: starts units as their needs are met, until the run is finished.

The output's files decide what is done. So a driver that dies is started again by the same command,
on any machine; units that still run are waited for by their locks.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from merit_fast.errors import InputError, MeritFastError
from merit_fast.execution.board import Board
from merit_fast.execution.command import Ended, UnitCommand, unit_command
from merit_fast.execution.view import View, has_table, shown
from merit_fast.manifests.ledger import UNITS_FOLDER
from merit_fast.pipeline.config import RunConfig, write_run_config
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.run import Run
from merit_fast.pipeline.storage.store import OutputStore
from merit_fast.pipeline.units.journal import write_event
from merit_fast.pipeline.units.listing import CONFIG_FILE
from merit_fast.pipeline.units.stored import take_plan, take_results
from merit_fast.progress import Progress
from merit_fast.units import human_bytes, human_time

RETRIES = 2
PATIENCE_S = 20.0  # until another machine's rename must be seen here


class Executor(Protocol):
    """Somewhere to run units."""

    threads: int | None  # CPU threads of a unit; None: as many as torch takes
    processes: int  # of a training, by torchrun

    @property
    def workers(self) -> int | None:
        """Units at a time; None: as many as there is room for."""
        ...

    def room(self) -> int:
        """Number of units that can start now."""
        ...

    def start(self, command: UnitCommand) -> None: ...

    def wait(self) -> list[Ended]:
        """Units that have ended since the last call; waits for one."""
        ...

    def stop(self) -> None:
        """Ends all units that run."""
        ...


def drive(
    config: RunConfig,
    executor: Executor,
    progress: Progress,
    command: str,
    *,
    verify: bool = False,
    retries: int = RETRIES,
    store: OutputStore | None = None,
) -> dict[str, Any]:
    """Checks a whole run, lets ``executor`` do its units, and returns ``Run.summary()``.

    A unit that dies is started again, ``retries`` times. Bad input ends the run at once.
    ``store``: units meet there, the config's ``output`` is each machine's folder for copies, and
    what the summary reads is copied at the end.

    Raises:
        LockedError: a process works in the output with another config.
        MeritFastError: a unit has failed; the message names its log. Other units are ended, with
            their work kept.
    """
    with _stopped_at_the_end(executor):
        run = Run(config, progress, command, verify=verify, store=store)
        if store is not None:
            take_plan(run)
        run.preflight()
        with run.claim():  # units of another config would read this one's file
            folder = Path(config.output) / UNITS_FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            settled = run.config  # a dtype that is "auto" is this machine's everywhere
            write_run_config(settled, folder / CONFIG_FILE)
            several = executor.workers is None or executor.workers > 1

            def make_data() -> RunData:
                fresh = Run(settled, progress, command, verify=verify, store=store)
                if store is not None:
                    take_plan(fresh)
                return fresh.data

            board = Board(make_data, has_shares=several)
            files = None if store is None else _stored_files(folder, store)
            Driver(board, executor, progress, folder, retries, files).run()
            run = Run(config, progress, command, store=store)
            if store is not None:
                take_results(run)
            return run.summary()


@dataclass(frozen=True)
class UnitFiles:
    """The words of every unit's command that say where its files lie.

    Attributes:
        config: the run's resolved YAML: its path, or its URL in a store.
        storage: the store and each machine's folder for copies; () without a store.
    """

    config: Path | str
    storage: tuple[str, ...] = ()


def _stored_files(folder: Path, store: OutputStore) -> UnitFiles:
    """Sends the config to the store, for units that see no file of this machine."""
    config = store.put_config((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    scratch = str(folder.parent.absolute())
    return UnitFiles(str(config), ("--storage", str(store.place), "--scratch", scratch))


class Driver:
    """The loop of ``drive``.

    Args:
        board: the run's units.
        executor: runs them.
        progress: gets a note for each, or shows a table.
        folder: for the journal and the logs.
        retries: times that a unit that dies is started again.
        files: where the units' files lie; None: on a disk that all machines share.
    """

    def __init__(
        self,
        board: Board,
        executor: Executor,
        progress: Progress,
        folder: Path,
        retries: int,
        files: UnitFiles | None = None,
    ) -> None:
        self.board = board
        self.executor = executor
        self.progress = progress
        self.folder = folder
        self.retries = retries
        self.files = files or UnitFiles(folder / CONFIG_FILE)
        self.running: dict[str, float] = {}  # unit -> its start
        self.failures: dict[str, int] = {}

    def run(self) -> None:
        """Runs until no unit is missing; on a terminal a table shows how far it is.

        Raises:
            MeritFastError: a unit has failed for good.
        """
        with shown(View(self), self.progress):
            while self.board.missing:
                self.start_ready()
                if not self.running:
                    missing = ", ".join(self.board.missing)
                    raise MeritFastError(f"no unit can start; missing: {missing}")
                for result in self.executor.wait():
                    self.settle(result)

    def start_ready(self) -> None:
        """Starts as many units as there is room for."""
        for name in self.board.ready(self.running):
            if self.executor.room() <= 0:
                return
            log = self.folder / "logs" / f"{name.replace('/', '.')}.log"
            command = unit_command(
                name,
                self.files.config,
                log,
                self.executor.threads,
                self.executor.processes,
                self.files.storage,
            )
            self.running[name] = time.monotonic()
            write_event(self.folder, {"event": "start", "unit": name})
            self.executor.start(command)

    def settle(self, result: Ended) -> None:
        """Takes in the end of a unit.

        Raises:
            InputError, MeritFastError: it has failed for good.
        """
        name = result.unit
        seconds = time.monotonic() - self.running.pop(name)
        write_event(self.folder, {"event": "end", "seconds": round(seconds, 3), **asdict(result)})
        if result.code == 0 and self._is_seen(name):
            self.board.refresh(name)
            if not has_table(self.progress):
                self.progress.note(self._sentence(result, seconds))
            return
        log = self.folder / "logs" / f"{name.replace('/', '.')}.log"
        if result.code == 0:
            text = f"ended on {result.host} without its output"
        else:
            text = result.text or f"ended with exit code {result.code}"
        if result.is_bad_input:
            raise InputError(f"{name}: {text.removeprefix('error: ')}")
        self.failures[name] = self.failures.get(name, 0) + 1
        if self.failures[name] > self.retries:
            raise MeritFastError(f"{name}: {text}; its log: {log}")
        self.progress.note(f"{name}: {text}; starting it again")

    def _is_seen(self, name: str) -> bool:
        """Whether the output is here; another machine's rename may take seconds to be seen."""
        end = time.monotonic() + PATIENCE_S
        while not self.board.is_done(name):
            if time.monotonic() > end:
                return False
            time.sleep(0.5)
        return True

    def _sentence(self, result: Ended, seconds: float) -> str:
        counts = self.board.counts
        answer = result.answer or {}
        moved = answer.get("read_bytes", 0) + answer.get("written_bytes", 0)
        copied = ""
        if "downloaded_bytes" in answer:
            down = human_bytes(answer["downloaded_bytes"])
            copied = f", {down} downloaded, {human_bytes(answer['uploaded_bytes'])} uploaded"
        return (
            f"{result.unit}: done in {human_time(seconds)} on {result.host}, "
            f"{human_bytes(moved)} moved{copied}; {counts.done} of {counts.total} units"
        )


@contextmanager
def _stopped_at_the_end(executor: Executor) -> Iterator[None]:
    try:
        yield
    finally:
        executor.stop()
