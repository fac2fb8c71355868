"""The hash of a file, taken while others write it: it is there as soon as the file is."""

import errno
import os
import threading
from collections.abc import Callable

from merit_fast.threads import Job

_BLOCK_BYTES = 1 << 20
_WAIT_S = 0.005  # between two looks at the writers


class FollowingHash:
    """XXH3, 128 bits, of an open file; a thread reads each byte once it is final.

    ``close`` ends the thread (``contextlib.closing``).

    Args:
        descriptor: the file, open for reading.
        written: returns the number of the first bytes that nobody writes any more.
    """

    def __init__(self, descriptor: int, written: Callable[[], int]) -> None:
        import xxhash

        self._digest = xxhash.xxh3_128()
        self._descriptor = descriptor
        self._written = written
        self._block = memoryview(bytearray(_BLOCK_BYTES))
        self._taken = 0
        self._stop = threading.Event()
        self._thread = Job(self._follow)

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def finish(self, num_bytes: int) -> str:
        """The hash in hex, of a file of so many bytes that nobody writes any more.

        Raises:
            OSError: the file cannot be read, or is shorter.
        """
        self._stop.set()
        self._thread.result()
        self._take(num_bytes)
        return str(self._digest.hexdigest())

    def _follow(self) -> None:
        while not self._stop.wait(_WAIT_S):
            self._take(self._written() // _BLOCK_BYTES * _BLOCK_BYTES)

    def _take(self, end: int) -> None:
        while self._taken < end:
            block = self._block[: min(end - self._taken, _BLOCK_BYTES)]
            count = os.preadv(self._descriptor, [block], self._taken)
            if count == 0:
                raise OSError(errno.EIO, f"the file ends after {self._taken:,} of {end:,} bytes")
            self._digest.update(block[:count])
            self._taken += count
