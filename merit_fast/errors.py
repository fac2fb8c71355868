"""The failures that a user meets: bad input (exit code 2) and everything else (exit code 1)."""


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


class BackendUnavailableError(MeritFastError, RuntimeError):
    """A backend that was asked for by name cannot run here. The message gives the reason."""


def one_line(error: BaseException) -> str:
    """The message of another library's error on one line, of at most 300 characters."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def show(value: object) -> str:
    """A value of the user's input as an error message quotes it, of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
