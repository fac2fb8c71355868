"""A file of several recipes, as mergekit-multi reads it: outputs with names feed later ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError, show
from merit_fast.integrations.mergekit.document import Document, document_of
from merit_fast.integrations.mergekit.recipe import (
    Recipe,
    check_document,
    merge_recipe,
    recipe_of,
)
from merit_fast.progress import Progress

STEPS_SUFFIX = ".steps"


@dataclass(frozen=True)
class Step:
    """One recipe of the file. ``name`` None: the last one, whose output is OUT."""

    name: str | None
    out: Path
    document: Document


def read_steps(file: Path, documents: Sequence[Any], out: Path) -> list[Step]:
    """The recipes of a file in the order in which they can run; the one without a name is last.

    The output of a recipe with a name goes into ``OUT.steps/NAME``.

    Raises:
        InputError: a name stands twice, is no folder's name or needs itself; not exactly one recipe
            lacks a name; a recipe breaks a rule that it breaks without its models.
    """
    names = [_name(file, number, values) for number, values in enumerate(documents, 1)]
    for name in {name for name in names if names.count(name) > 1}:
        if name is None:
            raise InputError(f"{file}: must have one document without a name, whose output is OUT")
        raise InputError(f"{file}: name: must stand once, got {show(name)} twice")
    if None not in names:
        raise InputError(f"{file}: must have a document without a name, whose output is OUT")
    made = {name: str(_step_out(out, name)) for name in names if name is not None}
    steps = {}
    for name, values in zip(names, documents, strict=True):
        body = {key: value for key, value in values.items() if key != "name"}
        where = f"{file}: document {name or 'without a name'}"
        document = document_of(body, where, made)
        check_document(document)
        steps[name] = Step(name, Path(made[name]) if name else out, document)
    return _in_order(file, steps)


def merge_steps(
    steps: Sequence[Step], progress: Progress, assignments: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs the recipes one after the other.

    Returns:
        The summary of the last one, with those of the others by name in ``steps``.
    """
    summaries: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for step in steps:
        recipe: Recipe = recipe_of(step.document, assignments)
        for note in recipe.notes:
            progress.note(f"{step.name or step.out}: {note}")
        step.out.parent.mkdir(parents=True, exist_ok=True)
        summary = merge_recipe(recipe, step.out, progress)
        if step.name is not None:
            summaries[step.name] = summary
    return summary | {"steps": summaries}


def _name(file: Path, number: int, values: Any) -> str | None:
    if not isinstance(values, dict):
        raise InputError(f"{file}: document {number}: must be a mapping of keys")
    name = values.get("name")
    if name is None:
        return None
    if not isinstance(name, str) or not name or name.startswith(".") or set(name) & set("/\\+@\0"):
        rule = "must be the name of a folder without / + and @"
        raise InputError(f"{file}: document {number}: name: {rule}, got {show(name)}")
    return name


def _step_out(out: Path, name: str) -> Path:
    return out.with_name(out.name + STEPS_SUFFIX) / name


def _in_order(file: Path, steps: Mapping[str | None, Step]) -> list[Step]:
    """Recipes after those that they read."""
    by_out = {str(step.out): step for step in steps.values()}
    ordered: list[Step] = []
    waiting = list(steps.values())
    while waiting:
        ready = [
            step
            for step in waiting
            if all(by_out[path] in ordered for path in _inputs(step) if path in by_out)
        ]
        if not ready:
            names = ", ".join(str(step.name) for step in waiting if step.name)
            raise InputError(f"{file}: the outputs {names} need each other")
        ordered += sorted(ready, key=lambda step: step.name is None)
        waiting = [step for step in waiting if step not in ready]
    return [step for step in ordered if step.name] + [steps[None]]


def _inputs(step: Step) -> set[str]:
    document = step.document
    references = [entry.reference for section in document.sections for entry in section.entries]
    references += [section.base for section in document.sections if section.base]
    references += [document.base] if document.base else []
    return {path for item in references for path in (item.model, item.lora) if path}
