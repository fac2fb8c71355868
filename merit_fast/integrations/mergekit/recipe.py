"""mergekit's own YAML as a merge of ours: `merit-fast merge --mergekit CONFIG.yml OUT`. Written for mergekit 0.1.5.

mergekit_yaml (text -> tree) -> here (tree -> MergeConfig, slices, paths) -> merge. What mergekit would ignore silently
is an error where it is unknown, and a note where it has no effect. Its defaults hold, not ours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError, show
from merit_fast.integrations.mergekit.document import (
    Document,
    Entry,
    Part,
    Reference,
    Scope,
    read_document,
)
from merit_fast.integrations.mergekit.settings import has, one_flag, setting
from merit_fast.integrations.mergekit.texts import check_texts
from merit_fast.merge import MergeConfig, merge_models
from merit_fast.merge.config import PARAMETERS
from merit_fast.merge.read.remote import Location, as_location
from merit_fast.merge.read.slices import Slice, Source
from merit_fast.model import resolve_model
from merit_fast.options.parser import override, parse
from merit_fast.progress import Progress

_ELSEWHERE = ("nuslerp", "karcher", "nearswap", "arcee_fusion", "ram", "ramplus_tl")
_BASELESS = ("linear", "passthrough")  # to these a base is a model like others, or not in it
_NORMALIZED = ("linear", "ties", "della", "multislerp")  # unless told otherwise
_RESCALED = ("dare_linear", "dare_ties", "della", "della_linear")
_FAMILY = {*PARAMETERS} - {
    "linear",
    "slerp",
    "multislerp",
    "model_stock",
    "passthrough",
    "sce",
}  # of task arithmetic
_OWN = ("weight", "density", "gamma", "epsilon")  # of one model
_SHARED = (
    "normalize",
    "lambda",
    "rescale",
    "int8_mask",
    "t",
    "select_topk",
    "filter_wise",
    "normalize_weights",
    "eps",
)
_DEFAULTS = {
    "density": 1.0,
    "gamma": 0.01,
    "epsilon": 0.15,
    "scale": 1.0,
    "lambda": 1.0,
    "select_topk": 1.0,
}
# Options that change how, where or whether we write, but nothing that the recipe says.
_ENGINE = (
    "seed", "missing", "dtype", "shard_size", "stats", "checksum", "allow_nonfinite", "fsync", "threads", "chunk_kib",
    "max_memory",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A merge to be done. ``models``: in order; with slices all that take part, in any.

    ``companions``: the model that gives config and tokenizer. ``notes``: what the user should know of the recipe.
    """

    models: tuple[Location, ...]
    base: Location | None
    config: MergeConfig
    slices: tuple[Slice, ...] = ()
    companions: Location | None = None
    notes: tuple[str, ...] = ()


def read_mergekit(file: Path, assignments: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe. Paths are as given, relative to the current directory; hub ids are downloaded.

    Args:
        assignments: ``key=value`` of MergeConfig, for what a recipe does not say (threads, seed, shard_size, ...).

    Raises:
        InputError: a key, method or value that mergekit or we do not have, by file and key; a model that is not there.
    """
    document = read_document(file)
    if document.method not in PARAMETERS:
        lacks = "is not among ours" if document.method in _ELSEWHERE else "is unknown"
        raise _error(
            document,
            "merge_method",
            f"{document.method} {lacks}; there are {', '.join(PARAMETERS)}",
        )
    notes = [*document.notes, *_check_names(document)]
    columns = [_places(document, part) for part in document.parts]
    most = max(len(entries) for entries, _ in columns)
    for part, (entries, _) in zip(document.parts, columns, strict=True):
        if len(entries) != most and document.method != "linear":
            raise _error(
                document, part.key, f"must be as many in every slice, got {len(entries)} and {most}"
            )
    values = _parameters(document, [entries for entries, _ in columns], most)
    config = _config(document, values, assignments)
    references = [
        entry.reference
        for entries, base in columns
        for entry in (*entries, *([base] if base else []))
    ]
    under = _check_adapters(document, references, [base.reference for _, base in columns if base])
    paths = _resolve(document, [*references, *([document.base] if document.base else [])], under)
    first_base = columns[0][1]
    donor = paths[document.base] if document.base and not document.base.lora else None
    base = paths[first_base.reference] if first_base else paths[under] if under else None
    notes += check_texts(document, paths, donor)
    slices: tuple[Slice, ...] = ()
    models = [paths[entry.reference] for entry in columns[0][0]]
    if document.parts[0].entries[0].layers:
        slices = tuple(_slice(entries, base_entry, most, paths) for entries, base_entry in columns)
        models = list(dict.fromkeys(paths[reference] for reference in references))
    if config.stats and slices:
        raise InputError("command line: stats: must be false where a recipe stacks slices")
    return Recipe(tuple(models), base, config, slices, donor, tuple(notes))


def merge_recipe(
    recipe: Recipe,
    out: str | Location,
    progress: Progress,
    *,
    dry_run: bool = False,
    share: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    """Does it; arguments, result and errors as ``merge_models`` has them."""
    models = [(path, None) for path in recipe.models]
    return merge_models(
        models,
        out,
        recipe.config,
        progress,
        recipe.base,
        dry_run,
        share,
        recipe.slices,
        recipe.companions,
    )


def _places(document: Document, part: Part) -> tuple[list[Entry], Entry | None]:
    """The models of a part in the order in which our methods take them, and the base apart."""
    entries, base, method = list(part.entries), part.base or document.base, document.method
    references = [entry.reference for entry in entries]
    for k, reference in enumerate(references):
        if reference in references[:k]:
            raise _error(document, reference.key, f"{reference} stands twice")
    if base and base not in references and not entries[0].layers:
        entries.append(Entry(base, Scope("base_model", {})))
    if method in _BASELESS or (method == "multislerp" and base is None):
        return entries, None
    if base is None:
        raise _error(document, "base_model", f"is required by method {method}")
    found = next((entry for entry in entries if entry.reference == base), None)
    if found is None:
        raise _error(
            document, part.key, f"must hold the base_model {base}, from which {method} starts"
        )
    if base.lora and method != "slerp":
        raise _error(document, base.key, f"must be a whole model, got the adapter {base}")
    others = [entry for entry in entries if entry is not found]
    return ([found, *others], None) if method == "slerp" else (others, found)


def _check_names(document: Document) -> list[str]:
    """Notes on parameters that the method does not read; an error for those that no method has."""
    takes, own_only = _taken(document.method), (*_OWN, "scale")
    notes = []
    inner = [entry.scope for part in document.parts for entry in part.entries]
    for scope in [*inner, *(part.scope for part in document.parts), *document.scopes]:
        for name in scope.values:
            if name not in (*own_only, *_SHARED):
                rule = f"is no parameter; {document.method} takes {', '.join(takes) or 'none'}"
                raise _error(document, f"{scope.key}.{name}", rule)
            if name not in takes:
                notes.append(
                    f"{scope.key}.{name}: has no effect with method {document.method}, nor has it in mergekit"
                )
            elif scope in inner and name not in own_only:
                notes.append(
                    f"{scope.key}.{name}: has no effect on one model, nor has it in mergekit"
                )
    if {"dare", "della"} & {*document.method.split("_")}:
        notes.append(
            f"{document.method}: what is dropped is drawn from our seed, what stays is divided by its probability; "
            "mergekit draws from torch and restores the sum of absolute values"
        )
    return notes


def _taken(method: str) -> list[str]:
    """mergekit's parameters that change the result of a method."""
    ours = PARAMETERS[method]
    names = ["weight"] if "weights" in ours else []
    names += [name for name in ("density", "gamma", "epsilon", "t", "select_topk") if name in ours]
    names += {
        "passthrough": ["scale"],
        "linear": ["normalize"],
        "model_stock": ["filter_wise"],
    }.get(method, [])
    names += ["normalize_weights", "eps"] if method == "multislerp" else []
    names += ["normalize", "lambda"] if method in _FAMILY else []
    return names + (["rescale"] if method in _FAMILY and method != "task_arithmetic" else [])


def _parameters(
    document: Document, columns: Sequence[Sequence[Entry]], most: int
) -> dict[str, Any]:
    """The recipe's numbers as values of MergeConfig. A slice of fewer models is filled up with weights of 0."""
    method, where, takes = document.method, document.where, _taken(document.method)
    shared = [*(part.scope for part in document.parts), *document.scopes]
    by_place: list[list[Scope]] = []
    for k in range(most):
        lacking = [
            Scope("", {"weight": 0.0}, s) for s, entries in enumerate(columns) if k >= len(entries)
        ]
        by_place.append(
            [*lacking, *(entries[k].scope for entries in columns if k < len(entries)), *shared]
        )
    values: dict[str, Any] = {"method": method}
    for name, key in (("lambda", "scale"), ("select_topk", "select_topk"), ("t", "t")):
        if name in takes:
            values[key] = setting(name, shared, _DEFAULTS.get(name), where)
    if method == "passthrough":
        values["scale"] = setting("scale", by_place[0], 1.0, where)
    own = [name for name in _OWN if name in takes]
    if own:
        values["models"] = [
            {name: setting(name, scopes, _DEFAULTS.get(name), where) for name in own}
            for scopes in by_place
        ]
    normalize = "normalize_weights" if method == "multislerp" else "normalize"
    if normalize in takes:
        values["normalize"] = one_flag(normalize, shared, method in _NORMALIZED, where)
    _check_fixed(document, shared, takes)
    for name in ("weight", "t"):
        if name in takes:
            _check_given(document, columns, name)
    return values


def _check_fixed(document: Document, shared: Sequence[Scope], takes: Sequence[str]) -> None:
    """What mergekit lets choose and we do not."""
    rescaled = document.method in _RESCALED
    for name, fixed in (("rescale", rescaled), ("filter_wise", False)):
        if name in takes and one_flag(name, shared, fixed, document.where) != fixed:
            key = next(scope.key for scope in shared if name in scope.values)
            raise _error(
                document,
                f"{key}.{name}",
                f"must be {str(fixed).lower()} with method {document.method}",
            )
    for scope in shared:
        if (
            "eps" in takes
            and "eps" in scope.values
            and setting("eps", [scope], None, document.where) != 1e-8
        ):
            raise _error(
                document, f"{scope.key}.eps", f"must be 1e-8, got {show(scope.values['eps'])}"
            )


def _check_given(document: Document, columns: Sequence[Sequence[Entry]], name: str) -> None:
    for part, entries in zip(document.parts, columns, strict=True):
        for entry in entries:
            own = [entry.scope] if name in _OWN else []
            if not has(name, [*own, part.scope, *document.scopes]):
                key = entry.scope.key if own else document.scopes[-1].key
                raise _error(document, f"{key}.{name}", f"is required by method {document.method}")


def _config(document: Document, values: dict[str, Any], assignments: Sequence[str]) -> MergeConfig:
    given = override({}, assignments)
    for key in given:
        if key not in _ENGINE:
            raise InputError(
                f"command line: {key}: is for the recipe to say; beside it go {', '.join(_ENGINE)}"
            )
    if document.dtype:
        values = {**values, "dtype": document.dtype}
    if document.parts[0].entries[0].layers:
        values = {
            **values,
            "shard_size": "5G",
        }  # the output's layers are in no order of any model's files
    return parse(
        MergeConfig,
        values | given,
        f"{document.where} with command line" if given else document.where,
    )


def _check_adapters(
    document: Document, references: Iterable[Reference], bases: Sequence[Reference]
) -> Reference | None:
    """The model that all adapters sit on, None without adapters. Where a method has a base it must be that."""
    under: Reference | None = None
    for reference in references:
        if reference.lora is None:
            continue
        sits_on = replace(reference, lora=None)
        for other in [*bases, *([under] if under else [])]:
            if other != sits_on:
                rule = f"an adapter must sit on {other}, as base_model or other adapters do, got {sits_on}"
                raise _error(document, reference.key, rule)
        if document.method == "multislerp" and not bases:
            raise _error(
                document,
                reference.key,
                f"an adapter needs base_model: {sits_on} with method multislerp",
            )
        under = sits_on
    return under


def _resolve(
    document: Document, references: Iterable[Reference], under: Reference | None
) -> dict[Reference, Location]:
    paths: dict[Reference, Location] = {}
    for reference in [*references, *([under] if under else [])]:
        text = reference.lora or reference.model
        try:
            local = Path(text).is_dir() or "://" in text
            paths[reference] = as_location(text) if local else resolve_model(text)
        except InputError as error:
            raise _error(document, reference.key, str(error).removeprefix("model: ")) from None
    return paths


def _slice(
    entries: Sequence[Entry], base: Entry | None, most: int, paths: dict[Reference, Location]
) -> Slice:
    def source(entry: Entry) -> Source:
        assert entry.layers is not None
        return Source(paths[entry.reference], *entry.layers)

    filled = [*entries, *[entries[0]] * (most - len(entries))]
    return Slice(tuple(source(entry) for entry in filled), source(base) if base else None)


def _error(document: Document, key: str, rule: str) -> InputError:
    return InputError(f"{document.where}: {key}: {rule}")
