"""Exports the groups of a split: rows, the stack's configurations, and the weights of a merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from merit_fast.data import Dataset
from merit_fast.data.mixture.select import MixtureRows
from merit_fast.errors import InputError
from merit_fast.export.axolotl import axolotl_config, axolotl_form
from merit_fast.export.form import Form, Names, free_names
from merit_fast.export.llamafactory import llamafactory_config, llamafactory_form, needs_mask
from merit_fast.export.rows import PartRows, part_rows
from merit_fast.export.settings import Settings, settings_of
from merit_fast.export.survey import Survey, survey
from merit_fast.export.trl import trl_config, trl_forms
from merit_fast.export.write import write_rows
from merit_fast.manifests.atomic import write_text
from merit_fast.options.yaml import read_yaml
from merit_fast.pipeline.arms import plan_branches
from merit_fast.pipeline.outputs import Outputs

FORMATS = ("axolotl", "llamafactory", "trl")
Stack = Literal["axolotl", "llamafactory", "trl"]


@dataclass(frozen=True)
class _Group:
    """The rows of one group, and the share of its target tokens that each dataset gives."""

    number: int
    train: tuple[PartRows, ...]
    held_out: tuple[PartRows, ...]
    num_target_tokens: int


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
    groups = _groups(outputs)
    surveys = {name: survey(parts) for name, parts in _by_dataset(groups).items()}
    names = free_names(surveys.values())
    planned = [_plan(stack, group, surveys, names) for group in groups]
    folder.mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {}
    described = []
    for group, (train, held_out) in zip(groups, planned, strict=True):
        rows = [_write(files, folder, names) for files in (train, held_out)]
        found = [surveys[part.name] for part in group.train]
        config, entries = _configs(
            stack, folder, (train, held_out), settings, user, group.number, found
        )
        info |= entries
        file = f"{stack}_{group.number}.yml"
        write_text(folder / file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        described.append(_described(group, train, held_out, rows, file))
    if info:
        write_text(folder / "dataset_info.json", _json(info))
    report = _report(stack, described, str(outputs.start), config_outputs(folder, user, groups))
    write_text(folder / "groups.json", _json(report))
    return report


def config_outputs(
    folder: Path, user: Mapping[str, Any] | None, groups: Sequence[_Group]
) -> list[str]:
    """The folders into which the stack saves the groups' models."""
    output = str((user or {}).get("output_dir", folder / "models"))
    return [f"{output}/group_{group.number}" for group in groups]


# ---- the rows of each group
def _groups(outputs: Outputs) -> list[_Group]:
    config = outputs.config
    split = outputs.split_manifest
    rows = MixtureRows(config.mixture, config.data)
    train = rows.select("train")
    held_out = rows.select("eval")
    entries = {entry.name: entry for entry in config.mixture}
    tokens = {row.name: (row.num_target_tokens, row.num_examples) for row in split.datasets}
    groups = []
    for branch in plan_branches(config, split, outputs.contents):
        if branch.arm != "merit" or branch.seed:
            continue
        parts = []
        target_tokens = 0.0
        for chosen in branch.rows:
            selection = train[chosen.dataset]
            # positions in place of examples: the cut depends on their number only
            whole = Dataset(chosen.dataset, cast(Any, range(len(selection.order))))
            positions = [int(cast(Any, i)) for i in chosen.choose(whole, config.split).examples]
            entry = entries[chosen.dataset]
            parts.append(part_rows(entry, config.data, "train", selection, positions))
            count, _ = tokens[chosen.dataset]
            target_tokens += count * len(positions) / max(1, len(selection.order))
        kept = [
            part_rows(entries[part.name], config.data, "eval", held_out[part.name])
            for part in parts
            if part.name in held_out
        ]
        groups.append(_Group(branch.group, tuple(parts), tuple(kept), round(target_tokens)))
    return groups


def _by_dataset(groups: Sequence[_Group]) -> dict[str, list[PartRows]]:
    parts: dict[str, list[PartRows]] = {}
    for group in groups:
        for part in (*group.train, *group.held_out):
            parts.setdefault(part.name, []).append(part)
    return parts


# ---- files
def _plan(
    stack: Stack, group: _Group, surveys: Mapping[str, Survey], names: Names
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
def _configs(
    stack: Stack,
    folder: Path,
    files: tuple[_Files, _Files],
    settings: Settings,
    user: Mapping[str, Any] | None,
    group: int,
    found: Sequence[Survey],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The group's configuration, and its entries of dataset_info.json."""
    train, held_out = (
        [(str(folder / name), form) for name, form in zip(part.names, part.forms, strict=True)]
        for part in files
    )
    if stack == "axolotl":
        return axolotl_config(train, held_out, settings, user, group), {}
    if stack == "trl":
        return trl_config(train, settings, user, group), {}
    entries = {}
    names = []
    for suffix, part in zip(("", "_val"), files, strict=True):
        of_part = []
        for i, (name, form) in enumerate(zip(part.names, part.forms, strict=True), 1):
            key = f"group_{group}{suffix}{f'_{i}' if i > 1 else ''}"
            entries[key] = {"file_name": name, **form.entry}
            of_part.append(key)
        names.append(of_part)
    config = llamafactory_config(
        names[0],
        names[1],
        settings,
        user,
        group,
        folder=folder,
        mask_history=needs_mask(found),
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
    group: _Group, train: _Files, held_out: _Files, rows: Sequence[int], config: str
) -> dict[str, Any]:
    return {
        "group": group.number,
        "datasets": [part.name for part in group.train],
        "train": list(train.names),
        "val": list(held_out.names),
        "config": config,
        "num_rows": rows[0],
        "num_val_rows": rows[1],
        "num_target_tokens": group.num_target_tokens,
    }


def _report(
    stack: Stack, groups: list[dict[str, Any]], base: str, models: Sequence[str]
) -> dict[str, Any]:
    total = sum(group["num_target_tokens"] for group in groups)
    for group, model in zip(groups, models, strict=True):
        group["weight"] = group["num_target_tokens"] / total
        group["model"] = model
    flags = " ".join(f"--model {group['model']}:{group['weight']:.6f}" for group in groups)
    return {
        "format": stack,
        "base": base,
        "groups": groups,
        "merge": f"merit-fast merge OUT {flags}",
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
