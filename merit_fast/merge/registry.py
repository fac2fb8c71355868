"""Merge methods by name: the built-in table, then methods that were registered or that packages offer."""

import difflib

from merit_fast.errors import InputError
from merit_fast.merge.table import METHODS, MergeMethod


def method_names() -> list[str]:
    """Names of the built-in methods."""
    return list(METHODS)


def method_named(name: str) -> MergeMethod:
    """The method of this name.

    Raises:
        InputError: there is none; the message names the nearest one.
    """
    if name in METHODS:
        return METHODS[name]
    names = method_names()
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise InputError(f"method: must be one of {', '.join(names)}, got {name!r}{hint}")
