"""Answers of a stack's own environment, by a Python script that runs there."""

import json
import subprocess
from typing import Any

from merit_fast.errors import MeritFastError
from merit_fast.train.stack.options import Engine

_TIMEOUT_S = 600  # of imports on a slow disk
_MARK = "merit_fast answer: "  # imports print lines of their own
_PRINT = f"""
import json
print({_MARK!r} + json.dumps(answer))
"""


def ask(engine: Engine, python: str, script: str, *words: str) -> Any:
    """The value that a script gives to ``answer`` in the stack's environment, through JSON.

    Args:
        engine: named by errors.
        python: the environment's interpreter.
        script: Python that sets ``answer``.
        words: its arguments.

    Raises:
        MeritFastError: the script fails, or takes ten minutes.
    """
    try:
        process = subprocess.run(
            [python, "-c", script + _PRINT, *words],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MeritFastError(
            f"train.engine: {engine} is not imported by {python} within {_TIMEOUT_S} s"
        ) from None
    line = next((x for x in process.stdout.splitlines() if x.startswith(_MARK)), None)
    if line is None:
        last = (process.stderr.strip().splitlines() or ["no output"])[-1]
        raise MeritFastError(f"train.engine: {engine} cannot be imported by {python}: {last}")
    return json.loads(line.removeprefix(_MARK))
