"""Exports the groups of a split: rows, the stack's configurations, and the weights of a merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from merit_fast.errors import InputError
from merit_fast.export.axolotl import axolotl_config, axolotl_form
from merit_fast.export.chosen import Group, groups_of
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

FORMATS = ("axolotl", "llamafactory", "trl")
_INFO = "dataset_info.json"
_GROUPS = "groups.json"
Stack = Literal["axolotl", "llamafactory", "trl"]


@dataclass(frozen=True)
class _Files:
    """Files of one part of one group: name, form, rows."""

    names: tuple[str, ...]
    forms: tuple[Form, ...]
    members: tuple[tuple[tuple[PartRows, Form], ...], ...]


def export_groups(
    outputs: Outputs, stack: Stack, out: Path, extend: Path | None = None
) -> dict[str, Any]:
    """Writes every group of the split into ``out``.

    Args:
        outputs: the run's outputs; the split must be there and up to date.
        stack: axolotl, llamafactory or trl.
        out: the folder; files of an earlier export are replaced.
        extend: the user's own YAML of that stack, whose keys are kept; None: a minimal one.

    Returns:
        The content of ``groups.json``.

    Raises:
        InputError: the stack cannot train on a row as the run does, or ``extend`` is no mapping.
        MeritFastError: the split is not there.
    """
    user = _read_user(extend)
    folder = out.expanduser().absolute()
    settings = settings_of(outputs.config, str(outputs.start), folder / "models")
    groups = groups_of(outputs)
    surveys = {name: survey(parts) for name, parts in _by_dataset(groups).items()}
    names = free_names(surveys.values())
    planned = [_plan(stack, group, surveys, names) for group in groups]
    _clear(folder)
    described = []
    info: dict[str, Any] = {}
    for group, files in zip(groups, planned, strict=True):
        counts = [_write(part, folder, names) for part in files]
        found = [surveys[part.name] for part in group.train]
        target = _Target(stack, folder, settings, user, group.number, counts[0])
        config, entries = target.configure(files, found)
        info |= entries
        write_text(
            folder / target.config_file,
            yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        )
        described.append(
            {
                **_described(group, files, counts),
                "config": target.config_file,
                "model": config["output_dir"],
            }
        )
    if info:
        write_text(folder / _INFO, _json(info))
    report = _report(stack, described, str(outputs.start))
    write_text(folder / _GROUPS, _json(report))
    return report


def _clear(folder: Path) -> None:
    """Makes the folder, and removes the files of an earlier export.

    Raises:
        InputError: the folder holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        return
    try:
        groups = json.loads((folder / _GROUPS).read_text())["groups"]
        old = [name for group in groups for name in (*group["train"], *group["val"])]
        old += [group["config"] for group in groups]
    except (OSError, ValueError, KeyError, TypeError):
        rule = "must be empty or hold an earlier export"
        raise InputError(f"{folder}: {rule}, found {min(folder.iterdir()).name}") from None
    for name in (*old, _INFO, _GROUPS):
        (folder / Path(name).name).unlink(missing_ok=True)


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
) -> tuple[_Files, _Files]:
    found = [surveys[part.name] for part in group.train]
    if stack == "trl":
        forms = trl_forms(found)
    else:
        form_of = axolotl_form if stack == "axolotl" else llamafactory_form
        forms = {one.name: form_of(one, names) for one in found}
    return (
        _files(f"train_{group.number}", group.train, forms),
        _files(f"val_{group.number}", group.held_out, forms),
    )


def _files(stem: str, rows: Sequence[PartRows], forms: Mapping[str, Form]) -> _Files:
    """One file for each form: STEM.jsonl, STEM.2.jsonl and so on."""
    by_key: dict[str, list[tuple[PartRows, Form]]] = {}
    for part in rows:
        form = forms[part.name]
        by_key.setdefault(form.key, []).append((part, form))
    names = [f"{stem}{f'.{i}' if i > 1 else ''}.jsonl" for i in range(1, len(by_key) + 1)]
    members = tuple(tuple(group) for group in by_key.values())
    return _Files(tuple(names), tuple(group[0][1] for group in members), members)


def _write(files: _Files, folder: Path, names: Names) -> int:
    return sum(
        write_rows(folder / name, members, names, folder / "images")
        for name, members in zip(files.names, files.members, strict=True)
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
        self, files: tuple[_Files, _Files], found: Sequence[Survey]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The configuration, and entries of dataset_info.json."""
        if self.stack == "llamafactory":
            return self._llamafactory(files, found)
        train, held_out = (
            [
                (str(self.folder / name), form)
                for name, form in zip(part.names, part.forms, strict=True)
            ]
            for part in files
        )
        if self.stack == "axolotl":
            return axolotl_config(train, held_out, self.settings, self.user, self.group), {}
        config = trl_config(train, self.settings, self.user, self.group, num_rows=self.num_rows)
        return config, {}

    def _llamafactory(
        self, files: tuple[_Files, _Files], found: Sequence[Survey]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        entries = {}
        names: list[list[str]] = []
        for suffix, part in zip(("", "_val"), files, strict=True):
            names.append([])
            for i, (name, form) in enumerate(zip(part.names, part.forms, strict=True), 1):
                key = f"group_{self.group}{suffix}{f'_{i}' if i > 1 else ''}"
                entries[key] = {"file_name": name, **form.entry}
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
def _described(group: Group, files: tuple[_Files, _Files], counts: Sequence[int]) -> dict[str, Any]:
    return {
        "group": group.number,
        "datasets": [part.name for part in group.train],
        "train": list(files[0].names),
        "val": list(files[1].names),
        "num_rows": counts[0],
        "num_val_rows": counts[1],
        "num_target_tokens": group.num_target_tokens,
    }


def _report(stack: Stack, groups: list[dict[str, Any]], base: str) -> dict[str, Any]:
    total = sum(group["num_target_tokens"] for group in groups)
    for group in groups:
        group["weight"] = group["num_target_tokens"] / total
    flags = " ".join(f"--model {group['model']}:{group['weight']:.6f}" for group in groups)
    merge = f"merit-fast merge OUT {flags}"
    return {"format": stack, "base": base, "groups": groups, "merge": merge}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
