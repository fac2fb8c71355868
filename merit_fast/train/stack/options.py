"""The rules of the options that name the stack of a branch's training."""

import string
from typing import Literal

from merit_fast.errors import InputError, show
from merit_fast.options.fields import require

Engine = Literal["builtin", "trl", "axolotl", "llamafactory", "swift", "command"]

PLACEHOLDERS = ("rows", "config", "base", "out", "branch", "group", "seed")


def check_engine_options(
    engine: Engine, config: str | None, command: str | None, python: str | None
) -> None:
    """Checks that the options of a stack go with the engine.

    Raises:
        InputError: an option goes with another engine, or a command lacks {out} or its input.
    """
    if engine == "builtin":
        for key, value in (("config", config), ("command", command), ("python", python)):
            require(value is None, f"engine_{key}", "absent with engine builtin", value)
        return
    if engine != "command":
        require(command is None, "engine_command", f"absent with engine {engine}", command)
        return
    for key, value in (("config", config), ("python", python)):
        require(value is None, f"engine_{key}", "absent with engine command", value)
    require(bool(command), "engine_command", "given with engine command", command)
    names = _placeholders(command or "")
    for name in names:
        require(
            name in PLACEHOLDERS,
            "engine_command",
            f"a command with placeholders of {', '.join(PLACEHOLDERS)}",
            f"{{{name}}}",
        )
    require("out" in names, "engine_command", "a command with {out}", command)
    reads = "rows" in names or "config" in names
    require(reads, "engine_command", "a command with {rows} or {config}", command)


def _placeholders(command: str) -> list[str]:
    """Names in braces; doubled braces are text."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(command) if name is not None]
    except ValueError as error:
        raise InputError(
            f"engine_command: must have its braces in pairs ({error}), got {show(command)}"
        ) from None
