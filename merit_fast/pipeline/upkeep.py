"""Brings outputs up to date: the locks, the ledger, the replaced branches that are kept."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.errors import InputError, MeritFastError, no_space
from merit_fast.manifests.directories import (
    commit_directory,
    copied_directory,
    output_directory,
    recover_directory,
)
from merit_fast.manifests.io import StageManifest
from merit_fast.manifests.locks import (
    LOCKS_FOLDER,
    LockedError,
    claim,
    exclusive,
    stage_lock,
    this_process,
)
from merit_fast.manifests.stages import SKETCH, TRAIN
from merit_fast.manifests.state import AGAIN, OutputState, check_output, differences
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.records import config_fingerprint, old_place
from merit_fast.progress import Progress

if TYPE_CHECKING:
    from merit_fast.pipeline.storage.store import OutputStore


class Upkeep:
    """Makes the outputs of one run, each by one process at a time.

    ``keep_replaced``: a trained branch that another one replaces moves to ``old/branches/``.
    """

    def __init__(self, outputs: Outputs, progress: Progress, keep_replaced: bool) -> None:
        self.outputs = outputs
        self.records = outputs.records
        self.progress = progress
        self.keep_replaced = keep_replaced
        self.owner = this_process(config_fingerprint(outputs.config))
        self._claims = 0
        self._waits = True

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Holds the output for processes of this config; may be nested.

        Raises:
            LockedError: a live process works here with another config.
            InputError: the output cannot be written.
        """
        root = self.outputs.root
        if self._claims:
            yield
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(claim(root / LOCKS_FOLDER, self.owner, root))
            self._claims += 1
            stack.callback(self._unclaim)
            if note := self.records.problem_note():
                self.progress.note(note)
                self.records.problem = ""
            yield

    def in_any_order(self, jobs: Sequence[Callable[[], bool]]) -> bool:
        """Runs all jobs; one whose output another process makes comes last.

        Returns:
            whether one of them had work to do.
        """
        postponed = []
        worked = False
        self._waits = False
        try:
            for job in jobs:
                try:
                    worked |= job()
                except LockedError:
                    postponed.append(job)
        finally:
            self._waits = True
        for job in postponed:
            worked |= job()
        return worked

    def bring(self, path: Path, manifest: StageManifest, work: Callable[[Path], None]) -> bool:
        """Fills ``path`` by ``work`` unless it is up to date.

        Raises:
            InputError: the output holds a file or is a folder that is not ours.
        """
        name = self.records.name(path)
        with self._locked(name):
            self.records.keep_hashes()
            state = self._recovered(path, manifest)
            if state.is_current:
                self.progress.note(f"{name}: up to date")
                return False
            self._refuse_foreign(state)
            if self._take_up(path, manifest, state):
                return False
            if state.state != "absent":
                self.progress.note(self._reason(name, manifest, state))
            keep_old = self._keep(name, state)
            started = time.perf_counter()
            keep_work = manifest.stage == SKETCH.name  # each dataset's file is checked by itself
            with (
                _with_full_disks_named(path),
                output_directory(
                    path, manifest, keep_old=keep_old, keep_work=keep_work
                ) as directory,
            ):
                work(directory)
            self._record_old(keep_old)
            self.records.add(path, time.perf_counter() - started)
        return True

    def take(self, path: Path, manifest: StageManifest, store: "OutputStore", whole: bool) -> None:
        """Makes ``path`` a copy of a finished output of the store, unless it is up to date.

        ``whole``: False: of its JSON files only; the copy counts in this process only.

        Raises:
            InputError: the path holds a file or is a folder that is not ours.
            MeritFastError: see ``OutputStore.fetch``.
        """
        name = self.records.name(path)
        if not whole:
            self.records.partial.add(name)
        with self._locked(name):
            state = self._recovered(path, manifest)
            if state.is_current:
                return
            self._refuse_foreign(state)
            keep_old = self._keep(name, state)
            digest = manifest.fingerprint
            text = store.stage_text(name, digest)
            with copied_directory(path, text, digest, keep_old) as directory:
                store.fetch(name, digest, directory, path, whole)
            self._record_old(keep_old)
            if whole:
                self.records.add(path, None)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Locks one output; waits for another process, or raises LockedError in any order."""
        lock = stage_lock(self.outputs.root, name)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(exclusive(lock, self.owner, wait=False))
            except LockedError as other:
                if not self._waits:
                    self.progress.note(f"{name}: {other} makes it; it comes last here")
                    raise
                self.progress.note(f"{name}: {other} makes it; waiting for it")
                stack.enter_context(exclusive(lock, self.owner))
            yield

    def _refuse_foreign(self, state: OutputState) -> None:
        if state.state == "foreign" or state.is_surplus:
            where = "" if state.state == "foreign" else f"{self.outputs.root}/"
            raise InputError(f"{where}{state.detail}; move it away")

    def _recovered(self, path: Path, manifest: StageManifest) -> OutputState:
        """The state of an output, after a finished ``NAME.tmp`` has got its name."""
        state = self.records.check(path, manifest.fingerprint, keep=True)
        if state.is_current or state.state == "foreign" or state.is_surplus:
            return state
        keep_old = self._keep(self.records.name(path), state)
        recover_directory(path, manifest.fingerprint, keep_old)
        self._record_old(keep_old)
        return self.records.check(path, manifest.fingerprint, keep=True)

    def _take_up(self, path: Path, manifest: StageManifest, state: OutputState) -> bool:
        """Brings back a branch that was replaced earlier, if all its bytes are there."""
        root = self.outputs.root
        name = self.records.name(path)
        ledger = self.records.ledger()
        known = [n for n, old in ledger.old.items() if old.fingerprint == manifest.fingerprint]
        places = [*(root / n for n in known), old_place(root, name, manifest.fingerprint)]
        old = next((place for place in places if place.exists()), None)
        if manifest.stage != TRAIN.name or old is None:
            return False
        old_name = self.records.name(old)
        earlier = check_output(root, old_name, manifest.fingerprint, ledger, whole=True)
        if not earlier.is_current:
            self.progress.note(f"{earlier.detail or old_name}: not taken up again")
            return False
        keep_old = self._keep(name, state)
        commit_directory(old, path, keep_old=keep_old)
        self._record_old(keep_old)  # before its record at the old place is overwritten
        self.records.check(path, manifest.fingerprint, keep=True)
        self.records.remove(old_name)
        self.progress.note(f"{name}: taken up again from {old_name}")
        return True

    def _keep(self, name: str, state: OutputState) -> Path | None:
        """The place to which a replaced branch moves; None if nothing is kept."""
        is_branch = state.record is not None and state.record.stage == TRAIN.name
        if not (is_branch and state.state == "other config" and self.keep_replaced):
            return None
        assert state.record is not None
        return old_place(self.outputs.root, name, state.record.fingerprint)

    def _record_old(self, place: Path | None) -> None:
        if place is not None and place.exists():
            self.records.check(place, None, keep=True)

    def _reason(self, name: str, manifest: StageManifest, state: OutputState) -> str:
        """One line: the damage, or the keys that differ, and what follows."""
        again = AGAIN[manifest.stage]
        if state.record is None or state.state == "damaged":
            return f"{state.detail}; {again}"
        changed = differences(state.record.config, manifest, state.record.inputs)
        return f"{name}: {changed}; {again}"

    def _unclaim(self) -> None:
        self._claims -= 1


@contextlib.contextmanager
def _with_full_disks_named(path: Path) -> Iterator[None]:
    """Names a file or the output in the error of a full disk: those of libraries name none."""
    try:
        yield
    except MeritFastError:
        raise
    except Exception as error:
        reason = no_space(error)
        if reason is None:
            raise
        file = getattr(error, "filename", None) or path
        raise MeritFastError(f"{file}: {reason}") from error
