"""Encodes chunks of rows in their order, in this process or in workers on the other cores."""

import contextlib
import itertools
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from merit_fast.data.config import DataConfig, DatasetConfig
from merit_fast.data.encode import RowEncoder
from merit_fast.data.sources import PlacedRow
from merit_fast.data.store.chunk import Chunk, pack_rows
from merit_fast.errors import MeritFastError

ROWS_AT_ONCE = 64  # tokenized in one call, which runs on all cores
_ROWS_PER_MESSAGE = 256
_ROWS_ALONE = 1024  # workers take a second to start


class ChunkEncoder:
    """Encodes the rows of one dataset after another. The chunks' bits are those of one process.

    Rows are read in this process, so that what a reader learns from earlier rows holds for all of
    them; templates and the tokenizer run in the workers.

    Args:
        tokenizer: a fast tokenizer, or a processor that holds one.
        data_config: the `data:` section.
        num_workers: worker processes from the first row on, 0: none. None: one per core, once
            this process has encoded some thousand rows.
    """

    def __init__(
        self, tokenizer: Any, data_config: DataConfig, num_workers: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._data_config = data_config
        cores = len(os.sched_getaffinity(0))
        self._num_workers = (cores if cores > 1 else 0) if num_workers is None else num_workers
        self._rows_left = _ROWS_ALONE if num_workers is None else 0
        self._workers: _Workers | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._workers is not None:
            self._workers.close()

    def chunks(
        self, config: DatasetConfig, encoder: RowEncoder, rows: Iterator[PlacedRow]
    ) -> Iterator[tuple[Chunk, int]]:
        """Yields (chunk, number of its rows), in the rows' order.

        Args:
            config: the dataset's entry.
            encoder: the dataset's encoder; its reader reads every row.
            rows: the rows, from the first.
        """
        first = 0
        while (not self._num_workers or self._rows_left > 0) and (
            batch := list(itertools.islice(rows, ROWS_AT_ONCE))
        ):
            yield pack_rows(encoder.encode(batch), first), len(batch)
            first += len(batch)
            self._rows_left -= len(batch)
        if self._num_workers:
            yield from self._by_workers(config, encoder, rows, first)

    def _by_workers(
        self, config: DatasetConfig, encoder: RowEncoder, rows: Iterator[PlacedRow], first: int
    ) -> Iterator[tuple[Chunk, int]]:
        waiting: deque[tuple[Future[Chunk], int]] = deque()
        while batch := list(itertools.islice(rows, _ROWS_PER_MESSAGE)):
            if self._workers is None:
                self._workers = _Workers(self._num_workers, (self._data_config, self._tokenizer))
            message = (config, encoder.read(batch), first)
            waiting.append((self._workers.submit(message), len(batch)))
            first += len(batch)
            if len(waiting) > 2 * self._num_workers:
                future, count = waiting.popleft()
                yield future.result(), count
        for future, count in waiting:
            yield future.result(), count


class _Workers:
    """Processes that run ``worker.main``, with a thread for each that waits for its answers."""

    def __init__(self, count: int, first_message: Any) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TOKENIZERS_PARALLELISM": "false",  # the workers share the cores already
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "merit_fast.data.store.worker"]
        pipe = subprocess.PIPE
        self._processes = [
            # its own process group: Ctrl-C interrupts this process, which ends the workers
            subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, process_group=0)
            for _ in range(count)
        ]
        self._new: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for process in self._processes:
            self._new.put(process)
        self._first_message = pickle.dumps(first_message, pickle.HIGHEST_PROTOCOL)
        self._threads = ThreadPoolExecutor(count)

    def submit(self, message: Any) -> "Future[Chunk]":
        """Sends a message to a worker that is free; its answer comes in the future."""
        return self._threads.submit(self._call, message)

    def close(self) -> None:
        """Ends the processes; answers that nobody took are lost."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
            process.wait()

    def _call(self, message: Any) -> Chunk:
        process = self._take()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(message, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            code = process.wait()
            raise MeritFastError(
                f"data: a process that tokenizes rows ended with code {code}"
            ) from None
        finally:
            self._free.put(process)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Chunk)
        return answer

    def _take(self) -> "subprocess.Popen[bytes]":
        """A free worker; a new one gets the first message."""
        with contextlib.suppress(queue.Empty):
            process = self._new.get_nowait()
            assert process.stdin is not None
            process.stdin.write(self._first_message)
            return process
        return self._free.get()
