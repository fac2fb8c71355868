"""The machine's floors: python -m bench.merge.floors NAME OUT BYTES MODEL ...

No merge can be faster than these: its bytes through memory, through the page cache, from and to the
disk. Prints seconds as one JSON object.
"""

import ctypes
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.merge.checkpoints import weight_files

MIB = 1 << 20
SYNC_FILE_RANGE_WRITE = 2
LIBC = ctypes.CDLL(None, use_errno=True)


def run_threads(work: Callable[[int], Any], threads: int) -> float:
    """Seconds for ``work(0)`` to ``work(threads - 1)`` in parallel; raises the first error."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=guarded, args=(number,)) for number in range(1, threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    guarded(0)
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    if errors:
        raise errors[0]
    return seconds


def aligned(num_bytes: int) -> memoryview:
    """Page-aligned memory for O_DIRECT, with its pages touched."""
    memory = mmap.mmap(-1, num_bytes)
    memory.write(os.urandom(min(num_bytes, MIB)) * max(1, num_bytes // MIB))
    return memoryview(memory)


def spans(size: int, piece: int, number: int, threads: int) -> Iterator[int]:
    """The offsets of one of ``threads`` workers: every ``threads``-th piece."""
    return iter(range(number * piece, size, threads * piece))


def write_file(
    path: Path,
    size: int,
    piece: int,
    threads: int = 1,
    direct: bool = False,
    allocate: bool = False,
    flags: int = 0,
    start_early: int = 0,
) -> dict[str, float]:
    """Seconds until the last write returned, and until the file was durable.

    ``start_early``: after so many bytes of its own a worker asks for their write-back, and waits
    only at the end.
    """
    path.unlink(missing_ok=True)
    os.sync()
    buffers = [aligned(piece) for _ in range(threads)]
    start = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0), 0o644)
    if allocate:
        os.posix_fallocate(descriptor, 0, size)

    def work(number: int) -> None:
        for at in spans(size, piece, number, threads):
            os.pwritev(descriptor, [buffers[number]], at, flags)
            if start_early and (at + piece) % start_early < piece:
                begin = ctypes.c_int64(max(0, at + piece - start_early))
                LIBC.sync_file_range(
                    descriptor, begin, ctypes.c_int64(start_early), SYNC_FILE_RANGE_WRITE
                )

    run_threads(work, threads)
    written = time.perf_counter() - start
    os.fsync(descriptor)
    durable = time.perf_counter() - start
    os.close(descriptor)
    return {"written": written, "durable": durable}


def memory(out: Path, num_bytes: int, models: Sequence[Path]) -> dict[str, float]:
    """Seconds for the inputs once and the output twice at the best bandwidth measured.

    The output counts twice, since a store reads its line first.

    memcpy counts 2 bytes per byte copied, the triad a = b + s c 3 per byte of a. 256 MiB each, best
    of 7.
    """
    import torch

    size = 256 * MIB
    a, b, c = (torch.full((size // 4,), value) for value in (0.0, 1.0, 2.0))
    gb_per_s = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        works: tuple[tuple[str, int, Callable[[int], Any]], ...] = (
            ("memcpy", 2, lambda _: a.copy_(b)),
            ("triad", 3, lambda _: torch.add(b, c, alpha=0.5, out=a)),
        )
        for name, factor, work in works:
            seconds = [run_threads(work, 1) for _ in range(8)][1:]
            gb_per_s[f"{name}_{threads}_gb_per_s"] = factor * size / min(seconds) / 1e9
    traffic = sum(os.path.getsize(file) for file in weight_files(*models)) + 2 * num_bytes
    return {"inner_wall_s": traffic / max(gb_per_s.values()) / 1e9, **gb_per_s}


def page_cache(out: Path, num_bytes: int, models: Sequence[Path]) -> dict[str, float]:
    """Reads every input and writes one output in 512 KiB pieces on one thread, no arithmetic."""
    buffer = memoryview(bytearray(512 * 1024))
    out.mkdir()
    start = time.perf_counter()
    for shard in weight_files(models[0]):
        sources = [os.open(model / shard.name, os.O_RDONLY) for model in models]
        target = os.open(out / shard.name, os.O_WRONLY | os.O_CREAT, 0o644)
        size = os.fstat(sources[0]).st_size
        for at in range(0, size, len(buffer)):
            for descriptor in sources:
                count = os.preadv(descriptor, [buffer], at)
            os.pwrite(target, buffer[:count], at)
        for descriptor in (*sources, target):
            os.close(descriptor)
    return {"inner_wall_s": time.perf_counter() - start}


def write(out: Path, num_bytes: int, models: Sequence[Path], **how: Any) -> dict[str, float]:
    """Writes the output's bytes, in whole pages, into one new file until they are durable."""
    piece = 512 * 1024
    return {
        "inner_wall_s": write_file(out, -(-num_bytes // piece) * piece, piece, **how)["durable"]
    }


def read(
    out: Path, num_bytes: int, models: Sequence[Path], piece: int, threads: int
) -> dict[str, float]:
    """Reads every input byte once, in order, with the kernel's readahead; threads share files."""
    files = weight_files(*models)

    def work(number: int) -> None:
        buffer = bytearray(piece)
        for file in files[number::threads]:
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while os.readv(descriptor, [buffer]):
                pass
            os.close(descriptor)

    return {"inner_wall_s": run_threads(work, threads)}


FLOORS: dict[str, Callable[[Path, int, Sequence[Path]], dict[str, float]]] = {
    "memory": memory,
    "page-cache": page_cache,
    "write": write,
    "write-allocated": lambda out, size, models: write(out, size, models, allocate=True),
    "write-early": lambda out, size, models: write(out, size, models, start_early=8 * MIB),
    "write-direct": lambda out, size, models: write(out, size, models, direct=True),
    "read-512k": lambda out, size, models: read(out, size, models, MIB // 2, 1),
    "read-8m": lambda out, size, models: read(out, size, models, 8 * MIB, 1),
    "read-8m-2": lambda out, size, models: read(out, size, models, 8 * MIB, 2),
}

if __name__ == "__main__":
    floor = FLOORS[sys.argv[1]](
        Path(sys.argv[2]), int(sys.argv[3]), [Path(path) for path in sys.argv[4:]]
    )
    print(json.dumps(floor))
