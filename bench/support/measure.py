"""Measures whole programs: children's time and memory, the page cache, medians, result files."""

import contextlib
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# ru_maxrss of a child starts at the memory of the process it was forked from: children come from
# this small one.
LAUNCHER = """
import json, os, sys, time
command, out, folder = json.loads(sys.argv[1])
os.chdir(folder)
redirect = [(os.POSIX_SPAWN_OPEN, fd, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            for fd, path in ((1, out), (2, out + ".err"))]
start = time.perf_counter()
child = os.posix_spawn(command[0], command, os.environ, file_actions=redirect)
_, status, usage = os.wait4(child, 0)
wall = time.perf_counter() - start
print(json.dumps({
    "wall_s": wall,
    "cpu_s": usage.ru_utime + usage.ru_stime,
    "peak_mib": usage.ru_maxrss / 1024,
    "exit": os.waitstatus_to_exitcode(status),
}))
"""
_CACHESTAT = 451  # the system call's number on every architecture, Linux 6.5


def run_child(
    command: Sequence[str | Path],
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Runs ``command`` and measures it.

    The result has wall seconds, CPU seconds (user + system, children included), peak MiB and the
    load average before the run.

    A JSON object on the last line of its standard output is added: what the child measured itself,
    without its imports. A failure gives ``{"error": last line of standard error}``.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        arguments = json.dumps(
            [[str(word) for word in command], str(out), str(folder or Path.cwd())]
        )
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, arguments]
        process = subprocess.run(
            launcher, capture_output=True, text=True, env={**os.environ, **(environment or {})}
        )
        if process.returncode:
            return {"error": process.stderr.strip().rpartition("\n")[2]}
        result = json.loads(process.stdout)
        if result.pop("exit"):
            return {
                "error": (_last_line(Path(f"{out}.err")) or _last_line(out) or "failed silently")[
                    :300
                ]
            }
        with contextlib.suppress(ValueError):
            inner = json.loads(_last_line(out))
            result |= {key: value for key, value in inner.items() if isinstance(value, float)}
    return {**result, "load": load}


def _last_line(file: Path) -> str:
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def read_all(files: Sequence[Path]) -> None:
    """Brings files into the page cache."""
    buffer = bytearray(1 << 20)
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def drop(files: Sequence[Path]) -> None:
    """Takes files out of the page cache. A host or controller below may still hold them."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cached_share(files: Sequence[Path]) -> float | None:
    """The share of the files' pages that is in the page cache; None where the kernel cannot say."""
    libc = ctypes.CDLL(None, use_errno=True)
    cached = total = 0
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        span = (ctypes.c_uint64 * 2)(0, 0)
        counts = (ctypes.c_uint64 * 5)()
        failed = libc.syscall(_CACHESTAT, descriptor, span, counts, 0)
        os.close(descriptor)
        if failed:
            return None
        cached += counts[0]
        total += -(-os.path.getsize(file) // os.sysconf("SC_PAGESIZE"))
    return cached / total


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    if len(values) < 2:
        return values[0], 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), high - low


def machine() -> dict[str, Any]:
    """The facts of the machine that a reader of the figures needs."""
    names = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGESIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


class Results:
    """A file of JSON lines: the circumstances, then one line per finished round or part.

    A run that finds its own file resumes after the last line; a file of other circumstances is
    refused.
    """

    def __init__(self, file: Path, circumstances: dict[str, Any]) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        # a line cut short by a crash does not end with a brace
        records = [json.loads(line) for line in lines if line.endswith("}")]
        if not records:
            file.write_text("")
            self.records: list[dict[str, Any]] = []
            self._write(circumstances)
        elif records[0] != circumstances:
            changed = sorted(
                key for key in circumstances if circumstances[key] != records[0].get(key)
            )
            difference = ", ".join(changed) or "program"
            sys.exit(f"{file}: was measured with another {difference}; remove it or choose another")
        else:
            self.records = records[1:]
            file.write_text("".join(json.dumps(record) + "\n" for record in records))

    def add(self, record: dict[str, Any]) -> None:
        """Appends a record durably."""
        self.records.append(record)
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        with open(self.file, "a") as stream:
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def of(self, kind: str) -> list[Any]:
        """The records of one kind."""
        return [record[kind] for record in self.records if kind in record]
