"""Runs what a file of mergekit holds: one recipe, several, or a mixture of experts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.integrations.mergekit.document import document_of
from merit_fast.integrations.mergekit.moe.build import merge_experts
from merit_fast.integrations.mergekit.moe.document import is_moe, moe_document
from merit_fast.integrations.mergekit.recipe import merge_recipe, recipe_of
from merit_fast.integrations.mergekit.several import merge_steps, read_steps
from merit_fast.merge.read.remote import as_location
from merit_fast.options.yaml import read_yaml_documents
from merit_fast.progress import Progress


def merge_mergekit(
    file: Path,
    out: str,
    progress: Progress,
    assignments: Sequence[str] = (),
    *,
    dry_run: bool = False,
    share: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    """Runs the recipe or recipes of a file into the directory ``out``.

    Args:
        file: YAML of mergekit-yaml or mergekit-moe, or several documents as mergekit-multi reads
            them.
        out: the output of the recipe, or of the one without a name.
        assignments: ``key=value`` of MergeConfig that a recipe cannot hold.
        dry_run: check and plan only.
        share: (i, n), this process's part of the output files.

    Returns:
        The summary of ``merge_models``; of several recipes that of the last, with ``steps``.

    Raises:
        InputError: see ``read_mergekit`` and ``read_steps``.
    """
    documents = read_yaml_documents(file)
    if len(documents) > 1:
        _require_simple(file, out, dry_run, share)
        return merge_steps(read_steps(file, documents, Path(out)), progress, assignments)
    values: Any = documents[0] if documents else None
    if is_moe(values):
        document = moe_document(values, str(file))
        return merge_experts(document, out, progress, assignments, dry_run=dry_run, share=share)
    recipe = recipe_of(document_of(values, str(file)), assignments)
    for note in recipe.notes:
        progress.note(note)
    return merge_recipe(recipe, out, progress, dry_run=dry_run, share=share)


def _require_simple(file: Path, out: str, dry_run: bool, share: tuple[int, int]) -> None:
    """Refuses what several recipes cannot do: later ones read outputs that are not there yet."""
    if dry_run:
        raise InputError(f"{file}: --dry-run goes with one recipe, got several documents")
    if share != (1, 1):
        raise InputError(f"{file}: --share goes with one recipe, got several documents")
    if not isinstance(as_location(out), Path):
        raise InputError(f"{file}: several documents need a local OUT, got {out}")
