"""A mergekit recipe as a tree of models or slices with parameters. Strict: every key is read."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError, show
from merit_fast.kernels.average.dtypes import SHORT_NAMES, SPELLINGS
from merit_fast.options.yaml import read_yaml

_TOP = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
)
_TEXTS = ("tokenizer_source", "tokenizer", "chat_template")
# Options of mergekit's command line that some files carry; mergekit does not read them there.
_IDLE_NOTE = "is an option of mergekit's command line and has no effect in its file"
_IDLE = ("lazy_unpickle", "lazy_loader", "low_cpu_memory", "clone_tensors", "read_to_gpu")
# Keys of mergekit's recipes that have no meaning here, with the reason.
_REFUSED = {
    "residual_weight": "must be absent: mergekit 0.1.5 does not read it either",
    "override_architecture": "must be absent: names of tensors come from the files and config.json",
}
_DTYPES = SPELLINGS | {short: short for short in SHORT_NAMES}


@dataclass(frozen=True)
class Reference:
    """A model, and the adapter on it."""

    model: str
    lora: str | None = None
    key: str = field(default="", compare=False)  # where it stands in the file

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else self.model


@dataclass(frozen=True)
class Scope:
    """One `parameters:` of the file. ``slice``: the slice it holds in, None: in all."""

    key: str
    values: Mapping[str, Any]
    slice: int | None = None


@dataclass(frozen=True)
class Entry:
    """One model of a section. ``layers``: its first layer and the end; None: the whole model."""

    reference: Reference
    scope: Scope
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Section:
    """One slice of the output, or the whole of it."""

    key: str
    entries: tuple[Entry, ...]
    base: Reference | None
    scope: Scope


@dataclass(frozen=True)
class Document:
    """A recipe. ``scopes``: parameters of all sections, innermost first. ``texts``: tokenizer.

    ``module``: the key under ``modules:`` that holds the sections, if there is one. With
    ``modules`` each of them has a recipe of its own, and the sections are those of all.
    """

    where: str
    method: str
    base: Reference | None
    sections: tuple[Section, ...]
    scopes: tuple[Scope, ...]
    dtype: str | None
    texts: Mapping[str, Any]
    notes: tuple[str, ...]
    made: Mapping[str, str]  # paths of other documents' outputs, by name
    module: str = ""
    modules: "Mapping[str, Document]" = field(default_factory=dict)

    def error(self, key: str, rule: str) -> InputError:
        """An error about one key of the file."""
        return InputError(f"{self.where}: {key}: {rule}")


def read_document(file: Path) -> Document:
    """Reads the file; no model. Raises InputError as ``document_of``, or if it is no YAML."""
    return document_of(read_yaml(file), str(file))


def document_of(values: Any, where: str, made: Mapping[str, str] | None = None) -> Document:
    """The recipe that ``values`` hold.

    Args:
        values: the value of one YAML document.
        where: the file, and the document in it, as errors name it.
        made: paths of the outputs of other documents, by their names.

    Raises:
        InputError: a key that mergekit does not have or we do not, a value of another kind.
    """
    modules = values.get("modules") if isinstance(values, dict) else None
    if isinstance(modules, dict) and len(modules) > 1:
        return _of_modules(values, where, made)
    reader = Reader(where, made or {})
    idle = [key for key in values if key in _IDLE] if isinstance(values, dict) else []
    top = reader.mapping(values, "", (*_TOP, *_TEXTS, *_IDLE))
    if not isinstance(top.get("merge_method"), str):
        raise reader.error(
            "merge_method", f"must be the name of a method, got {show(top.get('merge_method'))}"
        )
    body = top
    scopes = [reader.scope(top, "")]
    prefix = ""
    if sum(bool(top.get(key)) for key in ("models", "slices", "modules")) != 1:
        raise reader.error("", "must have exactly one of models, slices and modules")
    base = top.get("base_model")
    module = ""
    if modules := top.get("modules"):
        if not isinstance(modules, dict):
            raise reader.error("modules", f"must be a mapping of modules, got {show(modules)}")
        module, content = next(iter(modules.items()))
        prefix = f"modules.{module}"
        body = reader.mapping(content, prefix, ("models", "slices", "parameters"))
        if sum(bool(body.get(key)) for key in ("models", "slices")) != 1:
            raise reader.error(prefix, "must have exactly one of models and slices")
        scopes.insert(0, reader.scope(body, prefix))
    return Document(
        reader.where,
        top["merge_method"],
        None if base is None else reader.reference(base, "base_model"),
        reader.sections(body, prefix),
        tuple(scopes),
        reader.dtype(top),
        {key: top[key] for key in _TEXTS if top.get(key) is not None},
        (*(f"{key}: {_IDLE_NOTE}" for key in idle), *reader.dtype_note(top)),
        reader.made,
        str(module),
    )


def _of_modules(values: dict[str, Any], where: str, made: Mapping[str, str] | None) -> Document:
    parts = {
        str(name): document_of({**values, "modules": {name: body}}, where, made)
        for name, body in values["modules"].items()
    }
    first = next(iter(parts.values()))
    sections = tuple(section for part in parts.values() for section in part.sections)
    return replace(first, sections=sections, module="", modules=parts)


class Reader:
    """Reads the values of one document; its errors name the file and the key."""

    def __init__(self, where: str, made: Mapping[str, str]) -> None:
        self.where = where
        self.made = made

    def error(self, key: str, rule: str) -> InputError:
        return InputError(f"{self.where}: {key or 'the top level'}: {rule}")

    def mapping(self, value: Any, key: str, valid: Sequence[str]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(key, f"must be a mapping of keys, got {show(value)}")
        rule = f"is not supported; valid keys: {', '.join(valid)}"
        for name in value:
            if name not in valid:
                raise self.error(_join(key, str(name)), _REFUSED.get(name, rule))
        return value

    def sequence(self, value: Any, key: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self.error(key, f"must be a list of at least one, got {show(value)}")
        return value

    def scope(self, values: Mapping[str, Any], key: str, number: int | None = None) -> Scope:
        parameters = values.get("parameters")
        key = _join(key, "parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise self.error(key, f"must be a mapping of keys, got {show(parameters)}")
        return Scope(key, parameters or {}, number)

    def sections(self, values: Mapping[str, Any], prefix: str) -> tuple[Section, ...]:
        if values.get("models"):
            key = _join(prefix, "models")
            models = self.sequence(values["models"], key)
            entries = tuple(
                self.entry(value, f"{key}[{k}]", None) for k, value in enumerate(models)
            )
            return (Section(key, entries, None, Scope(key, {})),)
        key = _join(prefix, "slices")
        slices = self.sequence(values["slices"], key)
        return tuple(self.slice(value, f"{key}[{s}]", s) for s, value in enumerate(slices))

    def slice(self, value: Any, key: str, number: int) -> Section:
        fields = self.mapping(value, key, ("sources", "base_model", "parameters"))
        sources = self.sequence(fields.get("sources"), f"{key}.sources")
        entries = [
            self.entry(source, f"{key}.sources[{k}]", number) for k, source in enumerate(sources)
        ]
        depths = [entry.layers[1] - entry.layers[0] for entry in entries if entry.layers]
        for k, depth in enumerate(depths):
            if depth != depths[0]:
                rule = f"must span {depths[0]} layers as in sources[0], got {depth}"
                raise self.error(f"{key}.sources[{k}].layer_range", rule)
        base = fields.get("base_model")
        reference = self.reference(base, f"{key}.base_model") if base is not None else None
        return Section(f"{key}.sources", tuple(entries), reference, self.scope(fields, key, number))

    def entry(self, value: Any, key: str, number: int | None) -> Entry:
        valid = (
            ("model", "parameters") if number is None else ("model", "layer_range", "parameters")
        )
        fields = self.mapping(value, key, valid)
        reference = self.reference(fields.get("model"), f"{key}.model")
        if number is None:
            return Entry(reference, self.scope(fields, key))
        layers = fields.get("layer_range")
        whole = (
            isinstance(layers, list) and len(layers) == 2 and all(type(n) is int for n in layers)
        )
        if not whole or not 0 <= layers[0] < layers[1]:  # type: ignore[index]
            raise self.error(
                f"{key}.layer_range",
                f"must be [first, end] with 0 <= first < end, got {show(layers)}",
            )
        first, end = layers  # type: ignore[misc]
        return Entry(reference, self.scope(fields, key, number), (first, end))

    def reference(self, value: Any, key: str) -> Reference:
        """path, path+adapter, or {model: path or {path}, lora: the same}."""
        if isinstance(value, dict):
            fields = self.mapping(value, key, ("model", "lora"))
            model = self.path(fields.get("model"), f"{key}.model")
            lora = self.path(fields["lora"], f"{key}.lora") if fields.get("lora") else None
            return Reference(model, lora, key)
        path, plus, adapter = str(value).partition("+")
        if isinstance(value, str) and (os.path.isdir(value) or value in self.made) or not plus:
            return Reference(self.path(value, key), None, key)
        return Reference(self.path(path, key), self.path(adapter, key), key)

    def path(self, value: Any, key: str) -> str:
        """A folder, a URL, the output of another document, or a hub id with its @revision."""
        if isinstance(value, dict):
            fields = self.mapping(value, key, ("path", "revision"))
            value = fields.get("path")
            if fields.get("revision") is not None:
                value = f"{value}@{fields['revision']}"
        if not isinstance(value, str) or not value:
            raise self.error(key, f"must be a directory or a hub id, got {show(value)}")
        if value in self.made:
            return self.made[value]
        if os.path.isdir(value) or "://" in value:
            return value
        name, at, revision = value.partition("@")
        if "+" in value or (at and (not name or not revision or "@" in revision)):
            rule = "must name at most one adapter and one revision"
            raise self.error(key, f"{rule}, got {show(value)}")
        if at and (os.path.isdir(name) or name in self.made):
            raise self.error(
                key, f"must have no revision, as {name} is a folder, got {show(value)}"
            )
        return value

    def dtypes(self, top: Mapping[str, Any]) -> dict[str, str]:
        """The dtypes that are given, in our words, by their keys."""
        given = {key: str(top[key]) for key in ("dtype", "out_dtype") if top.get(key) is not None}
        names = {key: name.removeprefix("torch.") for key, name in given.items()}
        for key in (key for key, name in names.items() if name not in _DTYPES):
            raise self.error(key, f"must be one of {', '.join(SPELLINGS)}, got {show(top[key])}")
        return {key: _DTYPES[name] for key, name in names.items()}

    def dtype(self, top: Mapping[str, Any]) -> str | None:
        names = self.dtypes(top)
        return names.get("out_dtype", names.get("dtype"))

    def dtype_note(self, top: Mapping[str, Any]) -> tuple[str, ...]:
        if len(set(self.dtypes(top).values())) < 2:
            return ()
        rule = "is what mergekit computes in; here it is float64, rounded once to out_dtype"
        return (f"dtype: {top['dtype']} {rule} {top['out_dtype']}",)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
