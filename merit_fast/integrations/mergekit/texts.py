"""Tokenizer and chat template of a mergekit recipe, as options of a merge."""

from collections.abc import Mapping, Sequence
from typing import Any

from merit_fast.errors import show
from merit_fast.integrations.mergekit.document import Document, Reference
from merit_fast.merge.read.remote import Location
from merit_fast.merge.tokenizer_options import SOURCES, ZERO

_OPTIONS = ("source", "tokens", "pad_to_multiple_of")
_TOKEN_OPTIONS = ("source", "force")
_ROW_OPTIONS = ("kind", "model", "token", "token_id")


def text_values(document: Document, paths: Mapping[Reference, Location]) -> dict[str, Any]:
    """``tokenizer`` and ``chat_template`` as data for ``MergeConfig``.

    Args:
        paths: all models of the recipe; sources name them as the recipe does.

    Raises:
        InputError: both forms of the tokenizer, an unknown key, or a value of another kind.
    """
    texts = document.texts
    models = {str(reference): str(path) for reference, path in paths.items()}
    reader = _Reader(document, models | dict(document.made))
    values: dict[str, Any] = {}
    if "tokenizer_source" in texts and "tokenizer" in texts:
        raise document.error("tokenizer_source", "must be absent next to tokenizer")
    if "tokenizer_source" in texts:
        values["tokenizer"] = {"source": reader.source(texts["tokenizer_source"])}
    if "tokenizer" in texts:
        values["tokenizer"] = reader.tokenizer(texts["tokenizer"])
    if "chat_template" in texts:
        values["chat_template"] = texts["chat_template"]
    return values


class _Reader:
    def __init__(self, document: Document, models: Mapping[str, str]) -> None:
        self.document = document
        self.models = models

    def tokenizer(self, value: Any) -> dict[str, Any]:
        values = dict(self._mapping(value, "tokenizer", _OPTIONS))
        if "source" in values:
            values["source"] = self.source(values["source"])
        tokens = values.get("tokens")
        if tokens is not None:
            if not isinstance(tokens, dict):
                raise self._error("tokenizer.tokens", "must be a mapping of tokens", tokens)
            values["tokens"] = {text: self._token(text, row) for text, row in tokens.items()}
        return {key: item for key, item in values.items() if item is not None}

    def source(self, value: Any) -> str:
        """The tokenizer's source: a word, or a model's path."""
        text = self._reference(value, "tokenizer.source")
        if text == SOURCES[2]:  # mergekit has no such word: it would name a model
            rule = f"must be {SOURCES[0]}, {SOURCES[1]} or a model"
            raise self._error("tokenizer.source", rule, value)
        return self.models.get(text, text)

    def _token(self, text: Any, value: Any) -> dict[str, Any]:
        key = f"tokenizer.tokens.{text}"
        values = dict(self._mapping(value, key, _TOKEN_OPTIONS))
        source = values.get("source")
        if isinstance(source, dict) and "kind" in source:
            row = dict(self._mapping(source, f"{key}.source", _ROW_OPTIONS))
            if row.get("model") is not None:
                row["model"] = self._model(row["model"], f"{key}.source.model")
            values["source"] = row
        elif source is not None:
            values["source"] = self._model(source, f"{key}.source")
        return values

    def _model(self, value: Any, key: str) -> str:
        text = self._reference(value, key)
        if text != ZERO and text not in self.models:
            names = ", ".join(self.models)
            raise self._error(key, f"must be one of the recipe's models, {names}", value)
        return self.models.get(text, text)

    def _reference(self, value: Any, key: str) -> str:
        """A model as the recipe writes it: path, path+adapter, or {model: ..., lora: ...}."""
        if isinstance(value, dict):
            fields = self._mapping(value, key, ("model", "lora"))
            return "+".join(str(self._path(fields[name])) for name in fields if fields[name])
        if not isinstance(value, str):
            raise self._error(key, "must be text", value)
        return value

    def _path(self, value: Any) -> Any:
        return value.get("path") if isinstance(value, dict) else value

    def _mapping(self, value: Any, key: str, valid: Sequence[str]) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self._error(key, "must be a mapping of keys", value)
        for name in value:
            if name not in valid:
                rule = f"is not supported; valid keys: {', '.join(valid)}"
                raise self.document.error(f"{key}.{name}", rule)
        return value

    def _error(self, key: str, rule: str, value: Any) -> Exception:
        return self.document.error(key, f"{rule}, got {show(value)}")
