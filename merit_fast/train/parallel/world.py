"""The processes that a launcher such as torchrun has started together; imports no torch."""

import os

from merit_fast.errors import InputError

SIZE = "WORLD_SIZE"
RANK = "RANK"
LOCAL_SIZE = "LOCAL_WORLD_SIZE"


def world_size() -> int:
    """Number of processes that were started together; 1 without a launcher.

    Raises:
        InputError: the launcher's variables are no numbers or do not fit each other.
    """
    size = _number(SIZE, 1)
    if size > 1 and not 0 <= world_rank() < size:
        raise InputError(f"{RANK}: must be below {SIZE} {size}, got {world_rank()}")
    return max(size, 1)


def world_rank() -> int:
    """Number of this process among them."""
    return _number(RANK, 0)


def local_size() -> int:
    """Number of these processes on this machine; all of them where the launcher tells none."""
    return max(_number(LOCAL_SIZE, world_size()), 1)


def require_one_process(command: str) -> None:
    """Checks that no launcher started this process as one of several.

    Raises:
        InputError: every process would do the same work.
    """
    if world_size() > 1:
        raise InputError(
            f"{command}: {SIZE} must be 1, got {world_size()}: only merit-fast train and sketch "
            "share their work among the processes of torchrun"
        )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise InputError(f"{name}: must be a number, got {text!r}")
    return int(text) if text else default
