"""A store that fails and delays requests."""

import random
import threading
import time
from collections.abc import Callable
from typing import Any

from merit_fast.merge.read.remote import RemotePath

REQUESTS = ("find", "cat_file", "pipe_file", "put_file", "get_file", "rm_file", "exists")


class Faulty:
    """A file system of fsspec whose requests fail by chance, before or after they had an effect.

    ``failing`` is the share of requests that fail, ``delay_s`` the longest pause before one.
    ``after(method, path)`` is called after every request that has had its effect.
    """

    def __init__(self, store: Any, failing: float, delay_s: float = 0.0, seed: int = 0) -> None:
        self.inner = store
        self.failing = failing
        self.delay_s = delay_s
        self.failed = 0
        self.after: Callable[[str, str], None] = lambda method, path: None
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        return self._request(name, value) if name in REQUESTS else value

    def _request(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def request(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                fails = self._random.random() < self.failing
                has_effect = self._random.random() < 0.5
                pause = self._random.random() * self.delay_s
            time.sleep(pause)
            if fails:
                self.failed += 1
            if fails and not has_effect:
                raise TimeoutError(f"{name} took too long")
            answer = call(*args, **kwargs)
            self.after(name, str(args[-1] if name in ("put_file",) else args[0]))
            if fails:
                raise ConnectionResetError(f"the answer of {name} was lost")
            return answer

        return request


def with_faults(place: RemotePath, failing: float, delay_s: float = 0.0, seed: int = 0) -> Faulty:
    """Puts a faulty store in the place of ``place``'s own, and returns it."""
    faulty = Faulty(place.store, failing, delay_s, seed)
    place.store = faulty
    return faulty
