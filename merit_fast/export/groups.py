"""Exports the groups of a split: rows, the stack's configurations, and the weights of a merge."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from merit_fast.errors import InputError
from merit_fast.export.chosen import Group, groups_of
from merit_fast.export.folder import GROUPS, INFO, check_folder, export_folder
from merit_fast.export.form import free_names
from merit_fast.export.settings import check_exported, settings_of
from merit_fast.export.target import (
    RowFile,
    Stack,
    Target,
    plan_files,
    surveys_of,
    write_files,
)
from merit_fast.manifests.atomic import write_text
from merit_fast.options.yaml import read_yaml
from merit_fast.pipeline.outputs import Outputs
from merit_fast.progress import Progress, SilentProgress

FORMATS = ("axolotl", "llamafactory", "swift", "trl")


def export_groups(
    outputs: Outputs,
    stack: Stack,
    out: Path,
    extend: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes every group of the split into ``out``.

    Args:
        outputs: the run's outputs; the split must be there and up to date.
        stack: axolotl, llamafactory, swift or trl.
        out: the folder; files of an earlier export are replaced.
        extend: the user's own YAML of that stack, whose keys are kept; None: a minimal one.
        progress: display of the rows as they are tokenized; None: none.

    Returns:
        The content of ``groups.json``.

    Raises:
        InputError: the stack cannot train on a row as the run does, ``extend`` is no mapping, or
            ``out`` holds something else.
        MeritFastError: the split is not there.
    """
    user = read_user(extend)
    folder = out.expanduser().absolute()
    check_folder(folder)
    check_exported(outputs.config)
    settings = settings_of(outputs.config, str(outputs.start), folder / "models")
    groups = groups_of(outputs, progress or SilentProgress())
    surveys = surveys_of(groups)
    names = free_names(surveys.values())
    planned = [plan_files(stack, group, surveys, names) for group in groups]
    with export_folder(folder) as unfinished:
        described = []
        info: dict[str, Any] = {}
        for group, files in zip(groups, planned, strict=True):
            counts = [write_files(part, unfinished, folder, names) for part in files]
            found = [surveys[part.name] for part in group.train]
            target = Target(stack, folder, settings, user, group.number, counts[0])
            config, entries = target.configure(files, found)
            info |= entries
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            write_text(unfinished / target.config_file, text)
            own = {"config": target.config_file, "model": config["output_dir"]}
            described.append({**_described(group, files, counts), **own})
        if info:
            write_text(unfinished / INFO, _json(info))
        report = _report(stack, described, str(outputs.start))
        write_text(unfinished / GROUPS, _json(report))
    return report


def read_user(extend: Path | None) -> dict[str, Any] | None:
    """The user's own configuration of a stack; None without one.

    Raises:
        InputError: it is absent, or no mapping of keys.
    """
    if extend is None:
        return None
    value = read_yaml(extend)
    if not isinstance(value, dict):
        raise InputError(f"{extend}: must be a mapping of keys, got {type(value).__name__}")
    return {str(key): item for key, item in value.items()}


# ---- the report
def _described(
    group: Group, files: tuple[list[RowFile], list[RowFile]], counts: Sequence[int]
) -> dict[str, Any]:
    return {
        "group": group.number,
        "datasets": [part.name for part in group.train],
        "train": [file.name for file in files[0]],
        "val": [file.name for file in files[1]],
        "num_rows": counts[0],
        "num_val_rows": counts[1],
        "num_target_tokens": group.num_target_tokens,
    }


def _report(stack: Stack, groups: list[dict[str, Any]], base: str) -> dict[str, Any]:
    total = sum(group["num_target_tokens"] for group in groups)
    for group in groups:
        group["weight"] = group["num_target_tokens"] / total
    models = [shlex.quote(f"{group['model']}:{group['weight']:.6f}") for group in groups]
    flags = " ".join(f"--model {model}" for model in models)
    merge = f"merit-fast merge OUT {flags}"
    return {"format": stack, "base": base, "groups": groups, "merge": merge}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
