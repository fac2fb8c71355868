"""The command `init`: writes a commented YAML for the files that the user has."""

import argparse
import json
from pathlib import Path

from merit_fast.cli.flags import Parser, Work
from merit_fast.cli.stages import progress_of
from merit_fast.errors import InputError

_NAME = "merit.yml"


def add_init(parser: Parser) -> Work:
    """Adds the arguments of `init`; returns the function that does its work."""
    help = "a folder of datasets, or files of rows [default: the current folder]"
    parser.add_positional("places", "[FOLDER | FILE ...]", help, nargs="*")
    add = parser.add_argument
    add("--model", metavar="MODEL", help="base model: directory or hub id")
    help = f"the YAML to write [default: FOLDER/{_NAME}, for files {_NAME}]"
    add("--file", metavar="FILE.yml", help=help)
    add("--force", action="store_true", help="overwrite a file that is there")
    return _init


def _init(arguments: argparse.Namespace) -> None:
    places = [Path(text).expanduser() for text in arguments.places or ["."]]
    folder = places[0] if len(places) == 1 and places[0].is_dir() else Path()
    file = Path(arguments.file).expanduser() if arguments.file else folder / _NAME
    if file.exists() and not arguments.force:
        raise InputError(f"{file}: exists already; --force overwrites it, --file writes another")
    from merit_fast.init import draft_config
    from merit_fast.manifests.atomic import write_text

    progress = progress_of(arguments)
    draft = draft_config(places, arguments.model, file, progress)
    write_text(file, draft.text)
    if arguments.as_json:
        result = {"file": str(file), "datasets": draft.datasets, "unused": draft.unused}
        print(json.dumps(result))
        return
    print(f"{file}: wrote a run of these datasets: {', '.join(draft.datasets)}")
    for reason in draft.unused:
        print(f"not used: {reason}")
    if arguments.model is None:
        print(f"next: fill in `model:` in {file}")
    print(f"next: merit-fast data {file}\nnext: merit-fast run {file}")
