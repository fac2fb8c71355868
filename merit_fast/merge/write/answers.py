"""Files that decide how a merged model is asked and where it stops, compared between models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merit_fast.merge.read.adapters.folder import is_adapter
from merit_fast.merge.read.companions import list_companions
from merit_fast.merge.read.files import (
    copy_file,
    folder_of,
    list_directory,
    open_regular,
    read_json,
)
from merit_fast.merge.read.remote import Location

_TEMPLATE = "chat_template.jinja"
_TOKENIZER = "tokenizer_config.json"
_GENERATION = "generation_config.json"
DATA_FILE = "data.json"  # of models that merit-fast trained


def answer_notes(
    models: Sequence[Location], companions: Location, template: Location | None
) -> list[str]:
    """One sentence for each file in which a model differs from the one that gives it.

    A model without the file does not count, nor does an adapter.

    Args:
        models: of the merge.
        companions: the directory whose end tokens the output gets.
        template: the directory whose chat template it gets; None: it has one of its own.

    Raises:
        InputError: a file cannot be read, or should be JSON and is not.
    """
    notes = []
    for name, read, effect, source in (
        ("chat template", _template, "answers best when it is asked so", template),
        ("end tokens", _end_tokens, "may stop elsewhere", companions),
    ):
        if source is None:
            continue
        kept = read(source)
        others = [
            str(path)
            for path in models
            if folder_of(path) != source
            and not is_adapter(path)
            and read(folder_of(path)) not in (None, kept)
        ]
        if others:
            whose = ", ".join(others)
            notes.append(
                f"merge: the output has the {name} of {source}; {whose} has others and {effect}"
            )
    return notes


def copy_adapter_answers(models: Sequence[Location], directory: Path) -> None:
    """Copies tokenizer, chat template and end tokens of adapters into the merge of their weights.

    Only adapters with a data.json have them all: their trainer adds no token to the base's.

    Args:
        models: of the merge; the first gives the files if all are such adapters.
        directory: the output, which has the base's files.
    """
    if not all(is_adapter(path) and (path / DATA_FILE).exists() for path in models):
        return
    for name in list_companions(folder_of(models[0])):
        copy_file(models[0] / name, directory / name)


def _template(folder: Location) -> Any:
    present = list_directory(folder)
    if _TEMPLATE in present:
        with open_regular(folder / _TEMPLATE) as file:
            return file.read()
    if _TOKENIZER not in present:
        return None
    template = read_json(folder / _TOKENIZER).get("chat_template")
    return template.encode() if isinstance(template, str) else template


def _end_tokens(folder: Location) -> Any:
    if _GENERATION not in list_directory(folder):
        return None
    ids = read_json(folder / _GENERATION).get("eos_token_id")
    return {ids} if isinstance(ids, int) else set(ids or ()) or None
