"""Attempts in a store that are no output: of units that died while they sent it, or came second."""

import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta

from merit_fast.merge.read.remote import RemotePath
from merit_fast.pipeline.kept.status import OutputStatus
from merit_fast.pipeline.storage.place import list_objects, request
from merit_fast.pipeline.storage.store import ATTEMPT, FINISHED, OUTPUTS, OutputStore

LEAST_AGE = timedelta(days=1)  # of the newest object of an attempt that no process still sends


def dead_attempts(store: OutputStore) -> list[OutputStatus]:
    """Attempts that no finished output uses and to which nothing was added for ``LEAST_AGE``.

    The store's own clock tells the age, so that the clocks of machines do not count.

    Raises:
        InputError, MeritFastError: the store cannot be read, or written for its time.
    """
    store.look()
    used = store.used_folders()
    folders: dict[str, dict[str, int]] = {}
    for path, size in list_objects(store.place / OUTPUTS).items():
        folder = f"{OUTPUTS}/{_folder_of(path)}"
        folders.setdefault(folder, {})[path] = size
    unused = {name: files for name, files in folders.items() if name not in used}
    if not unused:
        return []
    ages = _Ages(store.place)
    return [
        OutputStatus(name, "unfinished", "an attempt that died", None, sum(files.values()))
        for name, files in sorted(unused.items())
        if min(ages.of(store.place / OUTPUTS / path) for path in files) >= LEAST_AGE
    ]


def remove_attempts(store: OutputStore, rows: Sequence[OutputStatus]) -> list[OutputStatus]:
    """Removes these attempts, unless an output uses one by now; returns the rows that are gone."""
    store.look()
    used = store.used_folders()
    gone = [row for row in rows if row.name not in used]
    for row in gone:
        folder = store.place / row.name
        store.remove([folder / name for name in list_objects(folder)])
    return gone


def _folder_of(path: str) -> str:
    """The folder of the attempt in ``NAME/attempt-DIGEST/FILE``."""
    parts = path.split("/")
    attempt = next((i for i, part in enumerate(parts) if part.startswith(ATTEMPT)), 0)
    return "/".join(parts[: attempt + 1])


class _Ages:
    """Ages of objects by the store's clock, which stamps an object that is written now."""

    def __init__(self, place: RemotePath) -> None:
        probe = place / FINISHED / f"clock-{uuid.uuid4().hex}"
        request(probe, lambda: probe.store.pipe_file(probe.path, b"now"))
        self._now = _modified(probe)
        request(probe, lambda: probe.store.rm_file(probe.path))

    def of(self, path: RemotePath) -> timedelta:
        return self._now - _modified(path)


def _modified(path: RemotePath) -> datetime:
    modified: datetime = request(path, lambda: path.store.modified(path.path))
    return modified
