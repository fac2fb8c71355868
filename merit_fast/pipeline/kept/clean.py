"""Removes from a run's output what is not in force, and unfinished work that no process owns."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from merit_fast.manifests.ledger import update_ledger, with_old, with_output
from merit_fast.manifests.locks import (
    LOCKS_FOLDER,
    LockedError,
    claim,
    exclusive,
    locks_of,
    owners,
    stage_lock,
    this_process,
)
from merit_fast.pipeline.kept.status import OutputStatus

_REMOVED = ("not in force", "unfinished")


def removable(rows: Sequence[OutputStatus]) -> list[OutputStatus]:
    """The rows that ``remove`` takes: nothing in force, nothing foreign, nothing being made."""
    return [row for row in rows if row.state in _REMOVED]


def path_of(root: Path, row: OutputStatus) -> Path:
    """The directory of a removable row."""
    is_work = row.state == "unfinished" and not row.name.endswith(".tmp")
    return root / (f"{row.name}.tmp" if is_work else row.name)


def remove(root: Path, rows: Sequence[OutputStatus]) -> list[OutputStatus]:
    """Removes these outputs; returns the rows that are gone.

    While another process works in the run, only unfinished work that it does not hold goes.
    """
    gone = []
    with ExitStack() as stack:
        live = owners(root / LOCKS_FOLDER)
        if not live:
            stack.enter_context(claim(root / LOCKS_FOLDER, this_process("clean"), root))
        for row in rows:
            if live and row.state != "unfinished":
                continue
            name = row.name.removesuffix(".tmp")
            try:
                with ExitStack() as held:
                    cleaner = this_process("clean", alone=True)
                    held.enter_context(exclusive(stage_lock(root, name), cleaner, wait=False))
                    held.enter_context(claim(locks_of(root / name), cleaner, root / name))
                    shutil.rmtree(path_of(root, row))
                    if row.state == "not in force":
                        _forget(root, row.name)
            except LockedError:
                continue
            gone.append(row)
    return gone


def _forget(root: Path, name: str) -> None:
    update_ledger(root, lambda ledger: with_old(with_output(ledger, name, None), name, None))
