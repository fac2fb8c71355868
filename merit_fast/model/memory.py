"""Memory of this process and of the machine, and what glibc does with freed memory."""

import os
from pathlib import Path


def peak_memory_bytes() -> int:
    """Highest resident memory of this process since ``reset_peak_memory`` (or its start)."""
    import resource

    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Resets the peak where the system allows it (Linux)."""
    clear = Path("/proc/self/clear_refs")
    if os.access(clear, os.W_OK):
        clear.write_text("5")


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that a process can take now: the system's, or less by the limit of its control group.

    Args:
        root: of the file system; for tests.
    """
    meminfo = (root / "proc/meminfo").read_text()
    available = int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024
    group = root / "sys/fs/cgroup"
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        held = (group / "memory.stat").read_text()
        cache = int(held.split("inactive_file ")[1].split()[0])  # the system frees it on demand
    except (OSError, ValueError, IndexError):
        return available  # no such group, or one without a limit ("max")
    return min(available, limit - used + cache)


def keep_freed_memory() -> None:
    """Lets glibc keep 256 MiB that torch frees, which saves training a page fault per 4 KiB."""
    _set_thresholds(mmap=128 << 20, trim=256 << 20)


def return_freed_memory() -> None:
    """Lets glibc return each tensor of 1 MiB and more as soon as torch frees it."""
    _set_thresholds(mmap=1 << 20, trim=16 << 20)


def _set_thresholds(mmap: int, trim: int) -> None:
    import ctypes

    trim_threshold = -1  # M_TRIM_THRESHOLD of malloc.h
    mmap_threshold = -3  # M_MMAP_THRESHOLD
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # another C library: nothing to tune
    mallopt(mmap_threshold, mmap)
    mallopt(trim_threshold, trim)
