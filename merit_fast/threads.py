"""Threads for work on files, as ``concurrent.futures`` has them.

That module takes 5 ms to import, logging included, and most merges need one thread.
"""

import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Job(threading.Thread):
    """A call in a thread of its own, which begins when an earlier job has ended."""

    def __init__(self, call: Callable[[], object], after: "Job | None" = None) -> None:
        super().__init__()
        self._call: Callable[[], object] | None = call
        self._after = after
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        if self._after is not None:
            self._after.join()
            self._after = None
        call = self._call
        self._call = None  # the call may hold this job, and nobody looks for such rings
        assert call is not None
        try:
            call()
        except BaseException as error:
            self._error = error

    def result(self) -> None:
        """Waits for the call and raises its error."""
        self.join()
        if self._error is not None:
            raise self._error


def map_in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """[function(item) for item in items], by up to so many threads.

    Raises:
        the error of the first item that has one.
    """
    listed = list(items)
    results: list[Any] = [None] * len(listed)
    errors: dict[int, BaseException] = {}
    numbers = itertools.count()

    def work() -> None:
        while (number := next(numbers)) < len(listed):
            try:
                results[number] = function(listed[number])
            except BaseException as error:
                errors[number] = error

    if len(listed) < 2:
        return [function(item) for item in listed]
    for job in [Job(work) for _ in range(min(threads, len(listed)))]:
        job.join()
    if errors:
        raise errors[min(errors)]
    return results
