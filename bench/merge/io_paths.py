"""Times ways to move a file's bytes from and to the disk: the choices for a merge's I/O.

    python -m bench.merge.io_paths DIR [--mib 1024] [--rounds 9] [--only write,copy,warm,cold]

DIR lies on the file system to measure; it needs twice the size. Every way runs once a round, each
round starting with another. io_uring is not among them: it needs rings shared with the kernel, and
from Python its overhead would be measured.
"""

import argparse
import ctypes
import errno
import fcntl
import mmap
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.merge.floors import LIBC, MIB, aligned, run_threads, spans, write_file
from bench.support.measure import drop, machine, read_all, spread

RWF_DONTCACHE = 0x80  # Linux 6.14: buffered, but the pages leave the cache when done with
FICLONE = 0x40049409


@dataclass(frozen=True)
class Way:
    """One way to move bytes; ``run`` gives seconds by phase, or None if it is not supported."""

    name: str
    run: Callable[[], dict[str, float] | None]
    prepare: Callable[[], object] = lambda: None


def read_file(
    path: Path,
    piece: int,
    threads: int = 1,
    direct: bool = False,
    flags: int = 0,
    ahead: int = 0,
    advice: int | None = None,
) -> dict[str, float]:
    """Reads a file. ``ahead``: a further thread asks for so many bytes before the first reader."""
    size = path.stat().st_size
    buffers = [aligned(piece) for _ in range(threads)]
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    reached = 0

    def work(number: int) -> None:
        nonlocal reached
        if number == threads:
            asked = 0
            while asked < size:
                if asked < reached + ahead:
                    LIBC.readahead(descriptor, ctypes.c_int64(asked), ctypes.c_size_t(4 * MIB))
                    asked += 4 * MIB
                else:
                    time.sleep(0.0002)
            return
        for at in spans(size, piece, number, threads):
            os.preadv(descriptor, [buffers[number]], at, flags)
            reached = max(reached, at)

    start = time.perf_counter()
    if advice is not None:
        os.posix_fadvise(descriptor, 0, 0, advice)
    run_threads(work, threads + bool(ahead))
    seconds = time.perf_counter() - start
    os.close(descriptor)
    return {"read": seconds}


def read_mapped(path: Path, piece: int, advice: int) -> dict[str, float]:
    """Copies from a mapping piece by piece into one buffer, so that bytes move as with pread."""
    buffer = aligned(piece)
    start = time.perf_counter()
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as memory:
        memory.madvise(advice)
        with memoryview(memory) as view:
            for at in range(0, len(view), piece):
                window = view[at : at + piece]
                buffer[: len(window)] = window
                window.release()
    return {"read": time.perf_counter() - start}


def copy_file(source: Path, target: Path, how: str) -> dict[str, float] | None:
    """Copies a file to a new one; None if the file system cannot do it this way."""
    target.unlink(missing_ok=True)
    os.sync()
    size = source.stat().st_size
    buffer = aligned(MIB // 2)
    start = time.perf_counter()
    with open(source, "rb") as reading, open(target, "wb") as writing:
        r = reading.fileno()
        w = writing.fileno()
        try:
            if how == "reflink":
                fcntl.ioctl(w, FICLONE, r)
            at = 0
            while how != "reflink" and at < size:
                if how == "copy_file_range":
                    at += os.copy_file_range(r, w, size - at, at, at)
                elif how == "sendfile":
                    at += os.sendfile(w, r, at, size - at)
                else:
                    at += os.pwrite(w, buffer[: os.preadv(r, [buffer], at)], at)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL):
                return None
            raise
        written = time.perf_counter() - start
        os.fsync(w)
    return {"written": written, "durable": time.perf_counter() - start}


def writing(path: Path, size: int) -> list[Way]:
    write = partial(write_file, path, size)
    half = MIB // 2
    return [
        *(Way(f"pwrite, {_kib(p)}", partial(write, p)) for p in (MIB // 8, MIB // 2, MIB, 8 * MIB)),
        Way("pwrite, 512 KiB, posix_fallocate", partial(write, MIB // 2, allocate=True)),
        Way("pwrite, 512 KiB, 2 threads", partial(write, MIB // 2, threads=2)),
        Way(
            "pwrite, 512 KiB, 2 threads, posix_fallocate",
            partial(write, half, threads=2, allocate=True),
        ),
        *(
            Way(
                f"pwrite, 512 KiB, write-back asked every {n} MiB",
                partial(write, half, start_early=n * MIB),
            )
            for n in (2, 8, 32, 128)
        ),
        Way(
            "pwrite, 512 KiB, write-back asked every 8 MiB, posix_fallocate",
            partial(write, MIB // 2, start_early=8 * MIB, allocate=True),
        ),
        Way(
            "pwrite, 512 KiB, write-back asked every 8 MiB, posix_fallocate, 2 threads",
            partial(write, MIB // 2, 2, start_early=8 * MIB, allocate=True),
        ),
        Way("pwrite, 512 KiB, RWF_DONTCACHE", partial(write, MIB // 2, flags=RWF_DONTCACHE)),
        Way("pwrite, 8 MiB, RWF_DONTCACHE", partial(write, 8 * MIB, flags=RWF_DONTCACHE)),
        *(
            Way(f"O_DIRECT, {_kib(p)}", partial(write, p, direct=True))
            for p in (MIB // 2, MIB, 4 * MIB, 8 * MIB)
        ),
        Way("O_DIRECT, 1 MiB, posix_fallocate", partial(write, MIB, direct=True, allocate=True)),
        Way("O_DIRECT, 1 MiB, 2 threads", partial(write, MIB, threads=2, direct=True)),
        Way("O_DIRECT, 8 MiB, 2 threads", partial(write, 8 * MIB, threads=2, direct=True)),
        Way(
            "O_DIRECT, 1 MiB, 2 threads, posix_fallocate",
            partial(write, MIB, 2, direct=True, allocate=True),
        ),
    ]


def copying(source: Path, target: Path) -> list[Way]:
    names = {
        "pread and pwrite, 512 KiB": "loop",
        "copy_file_range": "copy_file_range",
        "sendfile": "sendfile",
        "reflink (FICLONE)": "reflink",
    }
    warm = partial(read_all, [source])
    return [Way(name, partial(copy_file, source, target, how), warm) for name, how in names.items()]


def reading(source: Path, cold: bool) -> list[Way]:
    prepare = partial(drop if cold else read_all, [source])
    read = partial(read_file, source)
    mapped = partial(read_mapped, source)
    sequential = os.POSIX_FADV_SEQUENTIAL
    ways = {
        f"pread, {_kib(p)}": partial(read, p)
        for p in (MIB // 16, MIB // 4, MIB // 2, MIB, 4 * MIB, 8 * MIB)
    }
    ways |= {
        "pread, 512 KiB, 2 threads": partial(read, MIB // 2, threads=2),
        "pread, 512 KiB, RWF_DONTCACHE": partial(read, MIB // 2, flags=RWF_DONTCACHE),
        "mmap, copied in 512 KiB": partial(mapped, MIB // 2, mmap.MADV_SEQUENTIAL),
    }
    if cold:
        ways |= {
            "pread, 512 KiB, FADV_SEQUENTIAL": partial(read, MIB // 2, advice=sequential),
            "pread, 8 MiB, FADV_SEQUENTIAL": partial(read, 8 * MIB, advice=sequential),
            "pread, 512 KiB, FADV_WILLNEED": partial(read, MIB // 2, advice=os.POSIX_FADV_WILLNEED),
            **{
                f"pread, 512 KiB, readahead thread, {n} MiB": partial(read, MIB // 2, ahead=n * MIB)
                for n in (16, 64, 128)
            },
            "pread, 8 MiB, RWF_DONTCACHE": partial(read, 8 * MIB, flags=RWF_DONTCACHE),
            "O_DIRECT, 1 MiB": partial(read, MIB, direct=True),
            "O_DIRECT, 8 MiB": partial(read, 8 * MIB, direct=True),
            "O_DIRECT, 8 MiB, 2 threads": partial(read, 8 * MIB, threads=2, direct=True),
            "O_DIRECT, 8 MiB, 4 threads": partial(read, 8 * MIB, threads=4, direct=True),
        }  # fmt: skip
    return [Way(name, run, prepare) for name, run in ways.items()]


def measure(ways: list[Way], rounds: int) -> dict[str, list[dict[str, float]] | str]:
    """The rounds of every way, or the reason why there are none."""
    results: dict[str, list[dict[str, float]] | str] = {way.name: [] for way in ways}
    for number in range(rounds):
        start = number % len(ways)
        for way in (*ways[start:], *ways[:start]):
            runs = results[way.name]
            if isinstance(runs, str):
                continue
            way.prepare()
            try:
                result = way.run()
            except OSError as error:
                result = None
                results[way.name] = f"refused: {error.strerror}"
            if result is not None:
                runs.append(result)
            elif isinstance(results[way.name], list):
                results[way.name] = "not supported by this file system"
    return results


def table(title: str, size: int, results: dict[str, list[dict[str, float]] | str]) -> str:
    keys = next((list(runs[0]) for runs in results.values() if isinstance(runs, list) and runs), [])
    lines = []
    for name, runs in results.items():
        if isinstance(runs, str):
            lines.append(f"| {name} | {runs} |" + " |" * (3 * len(keys) - 1))
            continue
        cells = []
        for key in keys:
            median, iqr = spread([run[key] * 1e3 for run in runs])
            cells += [f"{median:.0f}", f"{iqr:.0f}", f"{size / median / 1e6:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    head = "| | " + " | ".join(f"{key} ms | IQR | GB/s" for key in keys) + " |"
    return "\n".join([f"**{title}**", "", head, "|" + "---|" * (head.count("|") - 1), *lines])


def _kib(num_bytes: int) -> str:
    return f"{num_bytes // MIB} MiB" if num_bytes >= MIB else f"{num_bytes // 1024} KiB"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--mib", type=int, default=1024, help="size of the file, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="write,copy,warm,cold")
    arguments = parser.parse_args()
    if arguments.mib <= 0 or arguments.mib % 8:
        parser.error(f"--mib: must be a positive multiple of 8, got {arguments.mib}")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    source = arguments.directory / "io-paths.source"
    target = arguments.directory / "io-paths.target"
    size = arguments.mib * MIB
    parts: dict[str, tuple[str, Callable[[], list[Way]]]] = {
        "write": ("A new file", lambda: writing(target, size)),
        "copy": ("A copy of a file in the page cache", lambda: copying(source, target)),
        "warm": ("Reading from the page cache", lambda: reading(source, cold=False)),
        "cold": ("Reading from the disk", lambda: reading(source, cold=True)),
    }
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    load = f"load average {os.getloadavg()[0]:.2f}"
    print(f"{arguments.mib} MiB, {arguments.rounds} rounds; {facts}; {load}\n")
    try:
        write_file(source, size, 8 * MIB)
        for name in arguments.only.split(","):
            title, ways = parts[name]
            print(f"{name} ...", file=sys.stderr, flush=True)
            print(table(title, size, measure(ways(), arguments.rounds)), end="\n\n", flush=True)
            target.unlink(missing_ok=True)
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
