"""Tells in one line that this install has no compiled kernels; pip hides the build's message."""

import logging
import sys

from merit_fast.kernels import dispatch

FIX = "install g++ 11 or newer, then in the clone: pip install --force-reinstall --no-deps ."
_WITHOUT_KERNELS = ("init", "data", "status", "clean", "advise", "report", "verify", "doctor")


def tell_missing_native(command: str) -> None:
    """Prints a line to standard error if the command would run on the compiled kernels.

    The line takes the place of one warning for every op.
    """
    if command in _WITHOUT_KERNELS or dispatch.native_module() is not None:
        return
    text = "the compiled CPU kernels are not part of this install; everything runs, but slower"
    print(f"note: {text}. To have them, {FIX}", file=sys.stderr)
    dispatch.logger.addFilter(_is_another_reason)


def _is_another_reason(record: logging.LogRecord) -> bool:
    return dispatch.NOT_BUILT not in record.getMessage()
