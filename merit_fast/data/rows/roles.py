"""Words for the roles of a conversation, and which role each stands for."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from merit_fast.errors import InputError, show

ROLES = ("system", "user", "assistant", "tool")
CALL = "function_call"  # an assistant's turn whose content is the call of a tool
_WORDS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    CALL: CALL,
}


def role_words(roles: Mapping[str, Sequence[str]] | None, where: str) -> dict[str, str]:
    """Word -> role: the common words, and those of an entry's ``roles``, which win.

    Args:
        roles: role -> its words. A role that no format knows reaches the template as it is.
        where: the entry, for error messages.

    Raises:
        InputError: a word stands for two roles, or a role is a misspelt one.
    """
    own: dict[str, str] = {}
    for role, words in (roles or {}).items():
        nearest = difflib.get_close_matches(role, (*ROLES, CALL), n=1, cutoff=0.75)
        if nearest and nearest != [role]:
            raise InputError(f"{where}: roles: must name roles such as {nearest[0]}, got {role!r}")
        for word in words:
            if own.setdefault(word, role) != role:
                rule = f"must give each word one role, got {word!r} for {own[word]} and {role}"
                raise InputError(f"{where}: roles: {rule}")
    return _WORDS | own


def read_role(value: Any, words: Mapping[str, str], where: str) -> str:
    """The role that a row's word stands for. Raises InputError for an unknown word."""
    role = words.get(value) if isinstance(value, str) else None
    if role is None:
        known = ", ".join(words)
        rule = f"must be one of {known}, or listed under the entry's roles"
        raise InputError(f"{where}: {rule}, got {show(value)}")
    return role
