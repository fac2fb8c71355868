"""Sentences about tensors that some model lacks: those of the base, and those left out."""

from collections import Counter
from collections.abc import Collection, Sequence

from merit_fast.merge.engine.layout import OutputFile
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.checkpoint import Checkpoint

_MOST_GROUPS = 4


def left_out_notes(checkpoints: Sequence[Checkpoint], keeps_values: bool) -> list[str]:
    """One sentence for each checkpoint that holds more than the output gets.

    Args:
        keeps_values: as in ``Checkpoint.names_left_out``.
    """
    notes = []
    for each in checkpoints:
        names = each.names_left_out(keeps_values)
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            notes.append(f"{each.path}: leaves out what is no tensor of the model: {shown}")
    return notes


def absence_notes(
    models: Sequence[Checkpoint],
    giver: Checkpoint | None,
    files: Sequence[OutputFile],
    missing: str,
) -> list[str]:
    """One sentence for each model whose tensors are filled from the base or left out.

    Args:
        models: of the merge, without the base.
        giver: the model that gives config.json, if it is read.
        files: of the output.
        missing: what happens to a tensor that some model lacks.

    Raises:
        InputError: the output lacks a tensor of the model that gives its config.json, and
            ``missing`` is "error".
    """
    output = {tensor.name for file in files for tensor in file.tensors}
    lacking = [name for name in giver.tensors if name not in output] if giver else []
    if giver and lacking and missing == "error":
        rule = f"{models[0].path}: {lacking[0]}: is missing, {giver.path} has it"
        raise OptionError(rule, "missing", "{} says what to do")
    notes = []
    for model in models if missing == "base" else ():
        if filled := [name for name in output if name not in model.tensors]:
            notes.append(f"{model.path}: {_count(filled)} come from the base: {_groups(filled)}")
    everyone = [*models, *([giver] if giver and giver not in models else [])]
    for model in everyone if missing == "drop" else ():
        if dropped := [name for name in model.tensors if name not in output]:
            rule = f"{_count(dropped)} are left out, as other models lack them"
            notes.append(f"{model.path}: {rule}: {_groups(dropped)}")
    return notes


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) != 1)}"


def _groups(names: Collection[str]) -> str:
    """Names in a few words: the largest groups by the first parts of the names."""
    groups = Counter(_tower(name) for name in names)
    shown = [f"{group} ({count})" for group, count in groups.most_common(_MOST_GROUPS)]
    return ", ".join([*shown, *(["..."] if len(groups) > _MOST_GROUPS else [])])


def _tower(name: str) -> str:
    """The first part of a name; after ``model``, which holds everything, the first two."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "model" and len(parts) > 2 else 1])
