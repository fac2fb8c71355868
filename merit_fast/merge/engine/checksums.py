"""Checksums that a file holds of its own parts."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from zlib import crc32

from merit_fast.merge.engine.plan import Frame

_BLOCK_BYTES = 1 << 20
_RUNS_AT_ONCE = 1024


def write_checksums(frame: Frame, descriptor: int, threads: int) -> None:
    """Reads runs of the output back, from memory as a rule, and writes their CRC-32."""

    def take(run: tuple[int, int, tuple[int, int]]) -> None:
        start, num_bytes, places = run
        crc = 0
        for at in range(start, start + num_bytes, _BLOCK_BYTES):
            count = min(_BLOCK_BYTES, start + num_bytes - at)
            crc = crc32(os.pread(descriptor, count, at), crc)
        for place in places:
            os.pwrite(descriptor, crc.to_bytes(4, "little"), place)

    runs = iter(frame.checksums())
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(itertools.islice(runs, _RUNS_AT_ONCE)):
            list(pool.map(take, batch))
