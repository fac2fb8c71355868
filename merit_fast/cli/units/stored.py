"""Flags and first steps of commands whose outputs lie in a store."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.cli.flags import Parser
from merit_fast.errors import InputError

if TYPE_CHECKING:
    from merit_fast.pipeline.storage.store import OutputStore


def add_storage_flags(parser: Parser) -> None:
    """Adds the place of the outputs and the folder of the copies here."""
    help = (
        "where finished outputs lie: an fsspec URL such as s3://bucket/run, or a folder that all "
        "machines see; without it they lie in the run's output"
    )
    parser.add_argument("--storage", metavar="URL", help=help)
    help = "with --storage: folder of this machine's copies and checkpoints [default: key `output`]"
    parser.add_argument("--scratch", metavar="FOLDER", help=help)


def store_of(arguments: argparse.Namespace) -> "OutputStore | None":
    """The store of --storage; None without it.

    Raises:
        InputError: the URL breaks a rule, or --scratch comes without it.
    """
    if arguments.storage is None:
        if arguments.scratch is not None:
            raise InputError("command line: --scratch: goes with --storage, which is not given")
        return None
    from merit_fast.pipeline.storage.place import open_place
    from merit_fast.pipeline.storage.store import OutputStore

    return OutputStore(open_place(arguments.storage))


def config_here(source: str, scratch: str | None) -> Path:
    """The path of a YAML or a run; a YAML's URL is copied into the scratch folder.

    Raises:
        InputError: the object is absent, or there is no scratch folder for the copy.
    """
    if "://" not in source:
        return Path(source)
    from merit_fast.manifests.atomic import write_text
    from merit_fast.manifests.ledger import UNITS_FOLDER
    from merit_fast.pipeline.storage.place import open_place, read_object

    if scratch is None:
        raise InputError(f"command line: --scratch: is absent; the config {source} is copied there")
    place = open_place(source)
    try:
        text = read_object(place)
    except FileNotFoundError:
        raise InputError(f"{source}: does not exist") from None
    file = Path(scratch) / UNITS_FOLDER / place.name
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    return file
