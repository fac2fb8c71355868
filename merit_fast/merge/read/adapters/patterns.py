"""Foreign regular expressions over module names, matched under a bound of time."""

import math
import re
import time
import warnings
from collections.abc import Mapping

from merit_fast.errors import InputError
from merit_fast.merge.read.files import quote

MAX_PATTERN = 1000  # characters
_MAX_REPEATS = 1000  # product of all counts: the library unrolls counted repetitions
_COUNTS = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")
_SECONDS = 5.0  # for all matches of one table; harmless patterns need a thousandth of it
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+")  # text, in which a dot may stand for any character


def pattern_error(text: str) -> str:
    """Why a text is no pattern that can be matched, or ""."""
    if len(text) > MAX_PATTERN:
        return f"at most {MAX_PATTERN} characters"
    if _PLAIN.fullmatch(text):
        return ""
    import regex  # only where a pattern is more than text

    counts = [max(int(number or 0) for number in pair) for pair in _COUNTS.findall(text)]
    if math.prod(max(count, 1) for count in counts) > _MAX_REPEATS:
        return f"counts of repetitions with a product of at most {_MAX_REPEATS}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about brackets that a later version may read otherwise
            re.compile(_whole(text))
            regex.compile(_whole(text))
    except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
        return type(error).__name__
    return ""


class Patterns:
    """A table of patterns, of which the first that fits a module's name counts.

        re.match(rf"(.*\\.)?({pattern})$", module)

    as in PEFT. The library ``regex`` matches with a time limit: a pattern that takes exponential
    time is an error.
    """

    def __init__(self, table: Mapping[str, float], where: str) -> None:
        self._table = table
        self._where = where
        self._spent = 0.0

    def first(self, module: str, default: float) -> float:
        """The value of the first pattern that fits, or the default.

        Raises:
            InputError: matching took more than 5 seconds in all.
        """
        for text, value in self._table.items():
            if self._fits(text, module):
                return value
        return default

    def _fits(self, text: str, module: str) -> bool:
        if _PLAIN.fullmatch(text):
            return re.match(_whole(text), module) is not None
        import regex

        started = time.monotonic()
        try:
            match = regex.match(_whole(text), module, timeout=max(_SECONDS - self._spent, 1e-3))
        except TimeoutError:
            raise InputError(
                f"{self._where}: {quote(text)}: takes more than {_SECONDS:g} s to match"
            ) from None
        self._spent += time.monotonic() - started
        return match is not None


def _whole(text: str) -> str:
    return rf"(.*\.)?({text})$"
