"""Locks that name their owner and end with it, on this machine and on a shared file system.

A lock is a ``flock`` on a small file that holds its owner. The kernel frees it when the owner dies,
and a forked child does not keep it.
"""

import contextlib
import fcntl
import itertools
import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from merit_fast.errors import InputError, write_error
from merit_fast.manifests.atomic import naming
from merit_fast.records import record, to_dict

LOCKS_FOLDER = ".locks"
_GUARD = "guard"
_OWNER = "owner-"
_held: set[int] = set()  # descriptors of this process's locks
_numbers = itertools.count()


class LockedError(InputError):
    """Another process works here."""


@record
class Owner:
    """A process that works on an output."""

    pid: int
    host: str
    command: str
    started: str  # local time, ISO 8601 to the second
    config: str  # fingerprint of its config
    alone: bool = False  # it shares the output with nobody, not even with its own config

    def __str__(self) -> str:
        day, _, clock = self.started.partition("T")
        since = clock[:5] if day == _now()[:10] else f"{day} {clock[:5]}"
        place = "" if self.host == host_name() else f" on {self.host}"
        return f"process {self.pid}{place} ({self.command}, since {since})"


def host_name() -> str:
    """The name of this machine in its network, as ``socket.gethostname`` gives it."""
    return os.uname().nodename


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def this_process(config: str, alone: bool = False) -> Owner:
    """The owner that this process is, with its command line."""
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    if program == "__main__.py":
        program = "merit-fast"
    command = " ".join([program, *sys.argv[1:]])
    return Owner(os.getpid(), host_name(), command, _now(), config, alone)


def locks_of(path: Path) -> Path:
    """The folder of locks of one output: hidden, and next to it."""
    return path.with_name(f".{path.name}{LOCKS_FOLDER}")


def check_owners(path: Path, config: str) -> None:
    """Refuses to touch an output that another process holds.

    Raises:
        LockedError: a live process has claimed ``path`` with another config.
    """
    for other in owners(locks_of(path)):
        is_this = (other.pid, other.host) == (os.getpid(), host_name())
        if not is_this and other.config != config:
            raise LockedError(f"{path}: {other} works here with another config")


@contextlib.contextmanager
def claim(folder: Path, owner: Owner, what: Path | str) -> Iterator[None]:
    """Shares ``folder`` with owners of the same config, and refuses an owner of another one.

    An owner that is ``alone`` shares with nobody.

    Args:
        folder: the folder of locks; made and removed as needed.
        owner: this process.
        what: the output that the error names.

    Raises:
        LockedError: a live process works here with another config, or one of them is alone.
        InputError: the folder cannot be written.
    """
    mine = folder / f"{_OWNER}{owner.host}-{owner.pid}-{next(_numbers)}"
    try:
        descriptor = _claim(folder, mine, owner, what)
    except OSError as error:
        raise write_error(what, error) from None
    try:
        yield
    finally:
        _remove_free(folder)
        _release(mine, descriptor)


def _remove_free(folder: Path) -> None:
    """Removes lock files that dead processes have left; one that is held stays."""
    for name in os.listdir(folder):
        try:
            descriptor = os.open(folder / name, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # its holder has removed it meanwhile
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(folder / name, descriptor):
                (folder / name).unlink()
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)


def _claim(folder: Path, mine: Path, owner: Owner, what: Path | str) -> int:
    with exclusive(folder / _GUARD):
        for other in owners(folder):
            if other.config != owner.config:
                raise LockedError(f"{what}: {other} works here with another config")
            if owner.alone or other.alone:
                raise LockedError(f"{what}: {other} works here")
        descriptor = _open_lock(mine)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _write_owner(descriptor, owner)
    return descriptor


def owners(folder: Path) -> list[Owner]:
    """Live processes that have claimed a folder; removes the lock files of dead ones."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.startswith(_OWNER))
    except FileNotFoundError:
        return []
    live = []
    for name in names:
        holder = _live_owner(folder / name)
        if holder is not None:
            live.append(holder)
        else:
            (folder / name).unlink(missing_ok=True)
    return live


def owner_of(lock: Path) -> Owner | None:
    """The live process that holds a lock of ``exclusive``; None if nobody does."""
    return _live_owner(lock)


def stage_lock(root: Path, name: str) -> Path:
    """The lock of one output of a run: only its holder writes the output."""
    return root / LOCKS_FOLDER / f"stage-{name.replace('/', '+')}"


@contextlib.contextmanager
def exclusive(lock: Path, owner: Owner | None = None, wait: bool = True) -> Iterator[None]:
    """Lets one process at a time through, by a lock file that is removed afterwards.

    Args:
        lock: the file; its folder is made and removed as needed.
        owner: written into the file, for others to name.
        wait: False: do not wait for another process.

    Raises:
        LockedError: another process holds the lock and ``wait`` is False.
    """
    while True:
        descriptor = _open_lock(lock)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            _close(descriptor)
            raise LockedError(str(_live_owner(lock) or "another process")) from None
        except BaseException:
            _close(descriptor)
            raise
        if _is_same(lock, descriptor):
            break
        _close(descriptor)  # the previous holder has removed this file: try the next one
    try:
        if owner is not None:
            with naming(lock):
                _write_owner(descriptor, owner)
        yield
    finally:
        _release(lock, descriptor)


def _open_lock(lock: Path) -> int:
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, FileExistsError):
            if _is_no_folder(lock.parent):
                raise
            continue  # another process removed the empty folder in between
        _held.add(descriptor)
        return descriptor


def _is_no_folder(path: Path) -> bool:
    """Whether something else than a folder lies there; one look, since others remove folders."""
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _is_same(lock: Path, descriptor: int) -> bool:
    try:
        return os.stat(lock).st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _live_owner(lock: Path) -> Owner | None:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_owner(descriptor)
    finally:
        os.close(descriptor)
    return None


def _read_owner(descriptor: int) -> Owner:
    try:
        return Owner(**json.loads(os.pread(descriptor, 1 << 16, 0)))
    except (ValueError, TypeError):  # it has the lock and has not written its name yet
        return Owner(0, host_name(), "not known", _now(), "")


def _write_owner(descriptor: int, owner: Owner) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(to_dict(owner)).encode(), 0)


def _release(lock: Path, descriptor: int) -> None:
    lock.unlink(missing_ok=True)
    _close(descriptor)
    if lock.parent.name.endswith(LOCKS_FOLDER):
        with contextlib.suppress(OSError):  # other processes have locks in it
            lock.parent.rmdir()


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
