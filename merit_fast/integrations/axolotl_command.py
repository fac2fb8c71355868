"""``axolotl merit-fast``: our command line as a command of axolotl's.

    axolotl merit-fast merge OUT --model branch-0 --model branch-1

axolotl finds it by the entry point ``axolotl.cli_commands``, where merit-fast is installed in its
environment. Needs click, as axolotl does.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click


@click.command(
    "merit-fast",
    short_help="split a mixture by gradients, and merge branches (merit-fast)",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    add_help_option=False,
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> NoReturn:
    """Runs merit-fast in this environment; it takes every word, ``--help`` too.

    It replaces the process: merit-fast sets threads and signals before torch is imported.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "merit_fast", *words])
