"""Encodes chunks of rows in their order, in this process or in workers on the other cores."""

import contextlib
import itertools
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
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

_Answer = queue.SimpleQueue[Chunk | Exception]


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
        waiting: deque[tuple[_Answer, int]] = deque()
        while batch := list(itertools.islice(rows, _ROWS_PER_MESSAGE)):
            if self._workers is None:
                self._workers = _Workers(self._num_workers, (self._data_config, self._tokenizer))
            message = (config, encoder.read(batch), first)
            waiting.append((self._workers.submit(message), len(batch)))
            first += len(batch)
            if len(waiting) > 2 * self._num_workers:
                answer, count = waiting.popleft()
                yield _chunk(answer), count
        for answer, count in waiting:
            yield _chunk(answer), count


class _Workers:
    """Processes that run ``worker.main``, with a thread for each that waits for its answers.

    Only queues join the threads: Ctrl-C may leave a lock that Python code takes, such as a
    Future's, locked for good.
    """

    def __init__(self, count: int, first_message: Any) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TOKENIZERS_PARALLELISM": "false",  # the workers share the cores already
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "merit_fast.data.store.worker"]
        pipe = subprocess.PIPE
        self._first_message = pickle.dumps(first_message, pickle.HIGHEST_PROTOCOL)
        self._messages: queue.SimpleQueue[tuple[bytes, _Answer] | None] = queue.SimpleQueue()
        self._processes = [
            # its own process group: Ctrl-C interrupts this process, which ends the workers
            subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, process_group=0)
            for _ in range(count)
        ]
        self._threads = [
            threading.Thread(target=self._serve, args=(process,), daemon=True)
            for process in self._processes
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, message: Any) -> "_Answer":
        """Sends a message to a worker that is free, and returns the queue that gets its answer."""
        answer: _Answer = queue.SimpleQueue()
        self._messages.put((pickle.dumps(message, pickle.HIGHEST_PROTOCOL), answer))
        return answer

    def close(self) -> None:
        """Ends the processes; answers that nobody took are lost."""
        for process in self._processes:
            process.kill()
        with contextlib.suppress(queue.Empty):
            while True:
                self._messages.get_nowait()
        for _ in self._threads:
            self._messages.put(None)
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
            process.wait()

    def _serve(self, process: "subprocess.Popen[bytes]") -> None:
        """Hands messages to one process and its answers to those who wait, until None comes."""
        opening = self._first_message
        while (item := self._messages.get()) is not None:
            message, answer = item
            answer.put(_ask(process, opening + message))
            opening = b""


def _ask(process: "subprocess.Popen[bytes]", message: bytes) -> Chunk | Exception:
    """The answer of a worker; an error if it has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(message)
        process.stdin.flush()
        answer = pickle.load(process.stdout)
    except (EOFError, OSError, pickle.UnpicklingError):
        code = process.wait()
        return MeritFastError(f"data: a process that tokenizes rows ended with code {code}")
    assert isinstance(answer, Chunk | Exception)
    return answer


def _chunk(answer: "_Answer") -> Chunk:
    """Waits for an answer; raises the error that it may be."""
    found = answer.get()
    if isinstance(found, Exception):
        raise found
    return found
