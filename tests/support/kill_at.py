"""Runs merit-fast and kills -9 itself in the middle of a stage, before a rename.

    python kill_at.py PATTERN COUNT ARGUMENTS...

It dies when the COUNT-th file or directory whose final path contains PATTERN is about to be renamed
to it. PATTERN$ matches only at the end of the path.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

pattern = sys.argv[1]
left = int(sys.argv[2])


def matches(path: str) -> bool:
    return path.endswith(pattern[:-1]) if pattern.endswith("$") else pattern in path


def killing(rename: Callable[..., None]) -> Callable[..., None]:
    def wrapper(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        global left
        if matches(str(target)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, *args, **kwargs)

    return wrapper


os.replace = killing(os.replace)
os.rename = killing(os.rename)
sys.argv = ["merit-fast", *sys.argv[3:]]

from merit_fast.cli.main import main  # noqa: E402

main()
