"""Exports the groups of a split: rows, the stack's configurations, and the weights of a merge."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from merit_fast.errors import InputError
from merit_fast.export.axolotl import axolotl_config, axolotl_form
from merit_fast.export.chosen import Group, groups_of
from merit_fast.export.folder import GROUPS, IMAGES, INFO, check_folder, export_folder
from merit_fast.export.form import Form, Names, free_names
from merit_fast.export.llamafactory import llamafactory_config, llamafactory_form, needs_mask
from merit_fast.export.rows import PartRows
from merit_fast.export.settings import Settings, settings_of
from merit_fast.export.survey import Survey, survey
from merit_fast.export.trl import trl_config, trl_forms
from merit_fast.export.write import write_rows
from merit_fast.manifests.atomic import write_text
from merit_fast.options.yaml import read_yaml
from merit_fast.pipeline.outputs import Outputs
from merit_fast.progress import Progress, SilentProgress

FORMATS = ("axolotl", "llamafactory", "trl")
Stack = Literal["axolotl", "llamafactory", "trl"]


@dataclass(frozen=True)
class _File:
    """A file of one part of one group: its name, number, description and rows."""

    name: str
    number: int  # from 1; equal for the training and held-out rows of the same datasets
    form: Form
    members: tuple[tuple[PartRows, Form], ...]


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
        stack: axolotl, llamafactory or trl.
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
    user = _read_user(extend)
    folder = out.expanduser().absolute()
    check_folder(folder)
    settings = settings_of(outputs.config, str(outputs.start), folder / "models")
    groups = groups_of(outputs, progress or SilentProgress())
    surveys = {name: survey(parts) for name, parts in _by_dataset(groups).items()}
    names = free_names(surveys.values())
    planned = [_plan(stack, group, surveys, names) for group in groups]
    with export_folder(folder) as unfinished:
        described = []
        info: dict[str, Any] = {}
        for group, files in zip(groups, planned, strict=True):
            counts = [_write(part, unfinished, folder, names) for part in files]
            found = [surveys[part.name] for part in group.train]
            target = _Target(stack, folder, settings, user, group.number, counts[0])
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


# ---- the rows of each group
def _by_dataset(groups: Sequence[Group]) -> dict[str, list[PartRows]]:
    parts: dict[str, list[PartRows]] = {}
    for group in groups:
        for part in (*group.train, *group.held_out):
            parts.setdefault(part.name, []).append(part)
    return parts


# ---- files
def _plan(
    stack: Stack, group: Group, surveys: Mapping[str, Survey], names: Names
) -> tuple[list[_File], list[_File]]:
    found = [surveys[part.name] for part in group.train]
    if stack == "trl":
        forms = trl_forms(found)
    else:
        form_of = axolotl_form if stack == "axolotl" else llamafactory_form
        forms = {one.name: form_of(one, names) for one in found}
    keys = {one.name: forms[one.name].key(one) for one in found}
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys.values()), 1)}
    by_name = {name: (forms[name], numbers[key]) for name, key in keys.items()}
    return (
        _files(f"train_{group.number}", group.train, by_name),
        _files(f"val_{group.number}", group.held_out, by_name),
    )


def _files(
    stem: str, rows: Sequence[PartRows], by_name: Mapping[str, tuple[Form, int]]
) -> list[_File]:
    """The files of one part: STEM.jsonl, STEM.2.jsonl and so on."""
    members: dict[int, list[tuple[PartRows, Form]]] = {}
    for part in rows:
        form, number = by_name[part.name]
        members.setdefault(number, []).append((part, form))
    return [
        _File(f"{stem}{_suffix('.', number)}.jsonl", number, own[0][1], tuple(own))
        for number, own in sorted(members.items())
    ]


def _suffix(separator: str, number: int) -> str:
    return f"{separator}{number}" if number > 1 else ""


def _write(files: Sequence[_File], unfinished: Path, folder: Path, names: Names) -> int:
    return sum(
        write_rows(unfinished / file.name, file.members, names, folder / IMAGES) for file in files
    )


# ---- configurations
@dataclass(frozen=True)
class _Target:
    """The stack's configuration of one group."""

    stack: Stack
    folder: Path
    settings: Settings
    user: Mapping[str, Any] | None
    group: int
    num_rows: int

    @property
    def config_file(self) -> str:
        """The configuration's name."""
        return f"{self.stack}_{self.group}.yml"

    def configure(
        self, files: tuple[list[_File], list[_File]], found: Sequence[Survey]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The configuration, and entries of dataset_info.json."""
        if self.stack == "llamafactory":
            return self._llamafactory(files, found)
        train, held_out = (
            [(str(self.folder / file.name), file.form) for file in part] for part in files
        )
        if self.stack == "axolotl":
            return axolotl_config(train, held_out, self.settings, self.user, self.group), {}
        config = trl_config(train, self.settings, self.user, self.group, num_rows=self.num_rows)
        return config, {}

    def _llamafactory(
        self, files: tuple[list[_File], list[_File]], found: Sequence[Survey]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        entries = {}
        names: list[list[str]] = []
        for word, part in zip(("", "_val"), files, strict=True):
            names.append([])
            for file in part:
                key = f"group_{self.group}{word}{_suffix('_', file.number)}"
                entries[key] = {"file_name": file.name, **file.form.entry}
                names[-1].append(key)
        config = llamafactory_config(
            names,
            self.settings,
            self.user,
            self.group,
            folder=self.folder,
            mask_history=needs_mask(found),
            num_rows=self.num_rows,
        )
        return config, entries


def _read_user(extend: Path | None) -> dict[str, Any] | None:
    if extend is None:
        return None
    value = read_yaml(extend)
    if not isinstance(value, dict):
        raise InputError(f"{extend}: must be a mapping of keys, got {type(value).__name__}")
    return {str(key): item for key, item in value.items()}


# ---- the report
def _described(
    group: Group, files: tuple[list[_File], list[_File]], counts: Sequence[int]
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
