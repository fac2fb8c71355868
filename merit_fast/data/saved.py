"""The options in data.json of a trained model: how its rows became tokens."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merit_fast.data.config import DataConfig
from merit_fast.errors import InputError, show
from merit_fast.manifests.atomic import write_text
from merit_fast.options.parser import override, parse, to_plain

DATA_FILE = "data.json"
# Of `data:`. The template itself is saved with the tokenizer.
_KEYS = (
    "max_length",
    "too_long",
    "train_on",
    "special_tokens_in_text",
    "date",
    "template_arguments",
    "ignore_columns",
)


def write_data_options(config: DataConfig, directory: Path) -> None:
    """Writes data.json next to a model that was trained on rows encoded so."""
    values = to_plain(replace(config, chat_template=None))
    chosen = {key: values[key] for key in _KEYS if key in values}
    write_text(directory / DATA_FILE, json.dumps(chosen, indent=2) + "\n")


def read_data_options(
    models: Sequence[Path], assignments: Sequence[str] = ()
) -> tuple[DataConfig, bool]:
    """The `data:` options with which models were trained, and whether the models tell them.

    Args:
        models: model folders; those without data.json tell nothing.
        assignments: ``KEY=VALUE`` that replace them.

    Raises:
        InputError: two models disagree on a key that is not assigned; a file or value is wrong.
    """
    files = [folder / DATA_FILE for folder in models if (folder / DATA_FILE).is_file()]
    assigned = {text.partition("=")[0] for text in assignments}
    values: dict[str, Any] = {}
    for number, file in enumerate(files):
        found = {key: value for key, value in _read(file).items() if key not in assigned}
        if number and found != values:
            key = next(k for k in {**found, **values} if found.get(k) != values.get(k))
            raise InputError(
                f"{file}: {key}: must be {show(values.get(key))} as in {files[0]}, "
                f"got {show(found.get(key))}; --validation data.{key}=VALUE decides"
            )
        values = found
    merged = override(values, assignments)
    where = str(files[0]) if files and not assignments else "command line"
    return parse(DataConfig, merged, where, "data"), bool(files)


def _read(file: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{file}: must be JSON") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: must be a JSON object, got {show(values)}")
    parse(DataConfig, values, str(file))
    return values
