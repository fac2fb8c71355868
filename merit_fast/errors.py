"""The two kinds of failure a user meets: bad input (exit code 2) and everything else (exit code 1)."""


class MeritFastError(Exception):
    """A run that could not be finished. The message is one line and names what was being done."""


class InputError(MeritFastError, ValueError):
    """The user's input breaks a rule. The message names the file, the key or tensor, the rule and the value found."""


class BackendUnavailableError(MeritFastError, RuntimeError):
    """A backend that was asked for by name cannot run here. The message says why."""


def one_line(error: BaseException) -> str:
    """The message of another library's error, without line breaks and not endless."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def show(value: object) -> str:
    """A value found in the user's input, as an error message quotes it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
