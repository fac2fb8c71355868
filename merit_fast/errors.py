"""The two kinds of failure a user meets: bad input (exit code 2) and everything else (exit code 1)."""


class MeritFastError(Exception):
    """A run that could not be finished. The message is one line and names what was being done."""


class InputError(MeritFastError, ValueError):
    """The user's input breaks a rule. The message names the file, the key or tensor, the rule and the value found."""


class BackendUnavailableError(MeritFastError, RuntimeError):
    """A backend that was asked for by name cannot run here. The message says why."""
