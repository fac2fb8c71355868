"""mergekit's YAML as a merge: `merit-fast merge --mergekit CONFIG.yml OUT`. For mergekit 0.1.5.

``document`` reads text into a tree; this module turns the tree into a MergeConfig, slices and
paths. An unknown key is an error, one without effect a note. mergekit's defaults hold.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.integrations.mergekit.document import (
    Document,
    Entry,
    Reference,
    Scope,
    Section,
    read_document,
)
from merit_fast.integrations.mergekit.numbers import check_names, merge_values
from merit_fast.integrations.mergekit.texts import text_values
from merit_fast.merge import MergeConfig, merge_models
from merit_fast.merge.combine.weights import resolve_weights, settle_weights
from merit_fast.merge.engine.modules import Module, tower_names
from merit_fast.merge.method import MergeMethod
from merit_fast.merge.read.names.towers import TEXT
from merit_fast.merge.read.remote import Location, as_location
from merit_fast.merge.read.slices import Slice, Source
from merit_fast.merge.table import METHODS
from merit_fast.model import resolve_model
from merit_fast.options.parser import override, parse
from merit_fast.progress import Progress

_WHOLE = "default"  # the only module of a model that has no towers
# Options that a recipe does not hold.
_ENGINE = (
    "seed", "missing", "dtype", "shard_size", "stats", "checksum", "allow_nonfinite", "fsync",
    "threads", "chunk_kib", "max_memory", "tokenizer", "chat_template",
    "form", "subtree", "config_from",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A merge to be done. ``models``: in order; with slices all of them, in any order.

    ``companions``: the model that gives config and tokenizer. ``notes``: facts for the user.
    ``modules``: towers, each with models of its own, instead of slices; ``models`` are all of them.
    """

    models: tuple[Location, ...]
    base: Location | None
    config: MergeConfig
    slices: tuple[Slice, ...] = ()
    companions: Location | None = None
    notes: tuple[str, ...] = ()
    modules: tuple[Module, ...] = ()


def read_mergekit(file: Path, assignments: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe. Paths are relative to the current folder; hub ids are fetched.

    Args:
        assignments: ``key=value`` of MergeConfig that a recipe cannot hold: threads, seed, ...

    Raises:
        InputError: a key, method or value that mergekit or this package lacks; a missing model.
    """
    return recipe_of(read_document(file), assignments)


def check_document(document: Document) -> tuple[MergeMethod, list[str]]:
    """The recipe's method, and notes on parameters that it does not read.

    Raises:
        InputError: the method or a parameter is unknown.
    """
    if document.method not in METHODS:
        rule = f"{document.method} is unknown; there are {', '.join(METHODS)}"
        raise document.error("merge_method", rule)
    method = METHODS[document.method]
    return method, check_names(document, method)


def recipe_of(document: Document, assignments: Sequence[str] = ()) -> Recipe:
    """The merge that a document describes; arguments and errors as ``read_mergekit``."""
    parts = document.modules or ({document.module: document} if document.module else {})
    if parts and list(parts) != [_WHOLE]:
        return _of_towers(document, parts, assignments)
    recipe = _of_models(document, assignments)
    if parts:
        _check_towers(document, parts, recipe.companions or recipe.models[0])
    return recipe


def _of_towers(
    document: Document, parts: Mapping[str, Document], assignments: Sequence[str]
) -> Recipe:
    """A recipe for each tower; the base_model gives the others."""
    holder = TEXT if TEXT in parts else next(iter(parts))
    if holder != TEXT and {"tokenizer", "tokenizer_source"} & document.texts.keys():
        raise document.error("tokenizer", f"goes with the module {TEXT}, which holds the rows")
    recipes = {
        name: _of_models(part if name == holder else replace(part, texts={}), assignments)
        for name, part in parts.items()
    }
    first = next(iter(recipes.values()))
    companions = first.companions or first.models[0]
    _check_towers(document, parts, companions)
    modules = []
    for name, recipe in recipes.items():
        config = settle_weights(recipe.models, recipe.config)
        weights = tuple(resolve_weights(recipe.models, config))
        modules.append(Module(name, recipe.models, weights, recipe.base, config, recipe.slices))
    places = (companions, *(path for recipe in recipes.values() for path in recipe.models))
    return replace(
        first,
        models=tuple(dict.fromkeys(places)),
        slices=(),
        companions=companions,
        notes=tuple(dict.fromkeys(note for each in recipes.values() for note in each.notes)),
        modules=tuple(modules),
    )


def _check_towers(document: Document, parts: Mapping[str, Document], giver: Location) -> None:
    """Refuses modules that the model lacks, and towers that nobody gives."""
    towers = tower_names(giver)
    for name in parts:
        if name not in towers:
            rule = f"is no tower of {giver}; there are {', '.join(towers)}"
            raise document.error(f"modules.{name}", rule)
    others = [name for name in towers if name not in parts]
    if others and document.base is None:
        rule = f"is required: it gives the towers {', '.join(others)}"
        raise document.error("base_model", rule)


def _of_models(document: Document, assignments: Sequence[str]) -> Recipe:
    method, notes = check_document(document)
    notes = [*document.notes, *notes]
    columns = [_order_models(document, section, method) for section in document.sections]
    most = max(len(entries) for entries, _ in columns)
    for section, (entries, _) in zip(document.sections, columns, strict=True):
        if len(entries) != most and not method.mergekit.uneven:
            rule = f"must be as many in every slice, got {len(entries)} and {most}"
            raise document.error(section.key, rule)
    values = merge_values(document, method, [entries for entries, _ in columns], most)
    references = [
        entry.reference
        for entries, base in columns
        for entry in (*entries, *([base] if base else []))
    ]
    bases = [base.reference for _, base in columns if base]
    under = _check_adapters(document, method, references, bases)
    paths = _resolve(document, [*references, *([document.base] if document.base else [])], under)
    first_base = columns[0][1]
    donor = paths[document.base] if document.base and not document.base.lora else None
    base = paths[first_base.reference] if first_base else paths[under] if under else None
    values |= text_values(document, paths)
    config = _config(document, values, assignments)
    slices: tuple[Slice, ...] = ()
    models = [paths[entry.reference] for entry in columns[0][0]]
    if document.sections[0].entries[0].layers:
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
    """Runs the recipe. Arguments, result and errors are those of ``merge_models``."""
    return merge_models(
        recipe.models,
        base=recipe.base,
        out=out,
        config=recipe.config,
        progress=progress,
        dry_run=dry_run,
        share=share,
        slices=recipe.slices,
        modules=recipe.modules,
        companions=recipe.companions,
    )


def _order_models(
    document: Document, section: Section, method: MergeMethod
) -> tuple[list[Entry], Entry | None]:
    """Entries of a section in the order in which our methods take them, and the base's entry."""
    entries = list(section.entries)
    base = section.base or document.base
    references = [entry.reference for entry in entries]
    for k, reference in enumerate(references):
        if reference in references[:k]:
            raise document.error(reference.key, f"{reference} stands twice")
    if base and base not in references and not entries[0].layers:
        entries.append(Entry(base, Scope("base_model", {})))
    if method.mergekit.base == "model" or (method.base == "optional" and base is None):
        return entries, None
    if base is None:
        raise document.error("base_model", f"is required by method {method.name}")
    base_entry = next((entry for entry in entries if entry.reference == base), None)
    if base_entry is None:
        rule = f"must hold the base_model {base}, from which {method.name} starts"
        raise document.error(section.key, rule)
    others = [entry for entry in entries if entry is not base_entry]
    if method.mergekit.base == "first model":
        return [base_entry, *others], None
    if base.lora:
        raise document.error(base.key, f"must be a whole model, got the adapter {base}")
    return others, base_entry


def _config(document: Document, values: dict[str, Any], assignments: Sequence[str]) -> MergeConfig:
    chosen = override({}, assignments)
    for key in chosen:
        if key not in _ENGINE or (key in values and key in ("tokenizer", "chat_template")):
            raise InputError(
                f"command line: {key}: is set by the recipe; next to it go {', '.join(_ENGINE)}"
            )
    if document.dtype:
        values = {**values, "dtype": document.dtype}
    if document.sections[0].entries[0].layers:
        values = {
            **values,
            "shard_size": "5G",
        }  # the output's layers are in no order of any model's files
    return parse(
        MergeConfig,
        values | chosen,
        f"{document.where} with command line" if chosen else document.where,
    )


def _check_adapters(
    document: Document,
    method: MergeMethod,
    references: Iterable[Reference],
    bases: Sequence[Reference],
) -> Reference | None:
    """The model under all adapters; None without adapters. A method's base must be that one."""
    under: Reference | None = None
    for reference in references:
        if reference.lora is None:
            continue
        sits_on = replace(reference, lora=None)
        for other in [*bases, *([under] if under else [])]:
            if other != sits_on:
                rule = (
                    f"an adapter must sit on {other}, as base_model or other adapters do, "
                    f"got {sits_on}"
                )
                raise document.error(reference.key, rule)
        if method.base == "optional" and not bases:
            rule = f"an adapter needs base_model: {sits_on} with method {method.name}"
            raise document.error(reference.key, rule)
        under = sits_on
    return under


def _resolve(
    document: Document, references: Iterable[Reference], under: Reference | None
) -> dict[Reference, Location]:
    paths: dict[Reference, Location] = {}
    for reference in [*references, *([under] if under else [])]:
        text = reference.lora or reference.model
        try:
            paths[reference] = locate(text)
        except InputError as error:
            raise document.error(reference.key, str(error).removeprefix("model: ")) from None
    return paths


def locate(text: str) -> Location:
    """The place of a model: a folder, a URL, or the snapshot of a hub id with its @revision."""
    if Path(text).is_dir() or "://" in text:
        return as_location(text)
    name, _, revision = text.partition("@")
    return resolve_model(name, revision or None)


def _slice(
    entries: Sequence[Entry], base: Entry | None, most: int, paths: dict[Reference, Location]
) -> Slice:
    def source(entry: Entry) -> Source:
        assert entry.layers is not None
        return Source(paths[entry.reference], *entry.layers)

    filled = [*entries, *[entries[0]] * (most - len(entries))]
    return Slice(tuple(source(entry) for entry in filled), source(base) if base else None)
