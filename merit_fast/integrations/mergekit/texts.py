"""Tokenizer and chat template of a mergekit recipe: accepted if they change nothing, else refused.

With `tokenizer_source` mergekit rewrites embedding rows for another vocabulary; this package does
not.
"""

import json
from collections.abc import Mapping
from typing import Any

from merit_fast.errors import InputError, show
from merit_fast.integrations.mergekit.document import Document, Reference
from merit_fast.merge.read.adapters.adapter import is_adapter
from merit_fast.merge.read.files import list_directory, open_regular, read_json
from merit_fast.merge.read.remote import Location


def check_texts(
    document: Document, paths: Mapping[Reference, Location], donor: Location | None
) -> list[str]:
    """Notes on accepted keys: equal vocabularies, and `chat_template: auto` over equal templates.

    Args:
        paths: all models.
        donor: the model whose tokenizer the output gets; None: the first.

    Raises:
        InputError: anything else.
    """
    texts = document.texts
    where = document.where
    notes = []
    models = [path for path in dict.fromkeys(paths.values()) if not is_adapter(path)]
    donor = donor or models[0]
    names = [
        "union",
        "base",
        *(str(reference) for reference, path in paths.items() if path == donor),
    ]
    for key in [key for key in ("tokenizer_source", "tokenizer") if key in texts]:
        if (source := _source(texts[key], key, where)) not in names:
            raise InputError(
                f"{where}: {key}: must be one of {', '.join(names)}, got {show(source)}"
            )
        vocabulary = _vocabulary(donor, key, where)
        for path in models:
            if _vocabulary(path, key, where) != vocabulary:
                raise InputError(
                    f"{where}: {key}: must be absent, as the vocabularies of {donor} and {path} "
                    "differ"
                )
        notes.append(
            f"{key}: all models have one vocabulary; embeddings keep their rows, files come from "
            f"{donor}"
        )
    if "chat_template" in texts:
        if texts["chat_template"] != "auto":
            raise InputError(
                f"{where}: chat_template: must be auto or absent, got "
                f"{show(texts['chat_template'])}"
            )
        for path in models:
            if _template(path) != _template(donor):
                raise InputError(
                    f"{where}: chat_template: must be absent, as those of {donor} and {path} differ"
                )
    return notes


def _source(value: Any, key: str, where: str) -> str:
    if key == "tokenizer":
        if not isinstance(value, dict):
            raise InputError(f"{where}: {key}: must be a mapping of keys, got {show(value)}")
        for name in value:
            if name != "source":
                raise InputError(f"{where}: {key}.{name}: is not supported; valid keys: source")
        value = value.get("source", "union")
    return str(value)


def _vocabulary(path: Location, key: str, where: str) -> str:
    if "tokenizer.json" not in list_directory(path):
        raise InputError(f"{where}: {key}: needs a tokenizer.json to compare, {path} has none")
    values = read_json(path / "tokenizer.json")
    model = values.get("model")
    tokens = values.get("added_tokens") or []
    added = [(token.get("id"), token.get("content")) for token in tokens]
    return json.dumps(
        [model.get("vocab") if isinstance(model, dict) else None, sorted(added)], sort_keys=True
    )


def _template(path: Location) -> str:
    """The bytes of its file, or the text in tokenizer_config.json."""
    present = list_directory(path)
    if "chat_template.jinja" in present:
        with open_regular(path / "chat_template.jinja") as opened:
            return opened.read().hex()
    config = read_json(path / "tokenizer_config.json") if "tokenizer_config.json" in present else {}
    return json.dumps(config.get("chat_template"))
