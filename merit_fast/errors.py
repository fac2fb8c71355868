"""The failures that a user meets: bad input (exit code 2) and everything else (exit code 1)."""

import errno
import re


class MeritFastError(Exception):
    """A run that could not be finished. The message is one line and names the operation."""


class InputError(MeritFastError, ValueError):
    """The user's input breaks a rule.

    The message names the file, the key or tensor, the rule and the value. A notebook shows this
    line without a traceback.
    """

    def _render_traceback_(self) -> list[str]:
        """The lines that IPython shows instead of a traceback."""
        return [f"InputError: {self}"]


_NO_SPACE = {
    errno.ENOSPC: "no space is left on its disk",
    errno.EDQUOT: "the quota of its disk is used up",
    errno.EFBIG: "it is larger than its disk or a limit of this process allows",
}
_OTHERS_NO_SPACE = re.compile(r"\(os error (\d+)\)")  # Rust's, in an error of safetensors


class BackendUnavailableError(MeritFastError, RuntimeError):
    """A backend that was asked for by name cannot run here. The message gives the reason."""


def no_space(error: BaseException) -> str | None:
    """The words for an error that a full disk has caused; None for any other error.

    They follow the name of a file and a colon.
    """
    number = error.errno if isinstance(error, OSError) else None
    match = _OTHERS_NO_SPACE.search(str(error))
    if number is None and match is not None:
        number = int(match[1])
    reason = _NO_SPACE.get(number or 0)
    return None if reason is None else f"{reason}; the same command resumes the work"


def write_error(path: object, error: OSError) -> MeritFastError:
    """The error for a file or folder that cannot be written.

    It is an InputError, or only a MeritFastError where the disk is full.
    """
    reason = no_space(error)
    if reason is not None:
        return MeritFastError(f"{path}: {reason}")
    return InputError(f"{path}: cannot be written: {error.strerror or error}")


def one_line(error: BaseException) -> str:
    """The message of another library's error on one line, of at most 300 characters."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def show(value: object) -> str:
    """A value of the user's input as an error message quotes it, of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
