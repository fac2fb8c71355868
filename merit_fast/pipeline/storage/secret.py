"""Secrets of the environment: their values never stand in a file, a log or a message."""

import os
import re
from collections.abc import Iterator

_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.I)
_LEAST_SECRET = 8  # characters: a shorter value may stand in a text by chance


def secrets_in(text: str) -> Iterator[str]:
    """Names of variables that hold a secret, by their names, whose value stands in ``text``."""
    for name, value in os.environ.items():
        if len(value) >= _LEAST_SECRET and _NAME.search(name) and value in text:
            yield name


def without_secrets(text: str) -> str:
    """The text with ``$NAME`` in place of the value of each secret variable."""
    for name in secrets_in(text):
        text = text.replace(os.environ[name], f"${name}")
    return text
