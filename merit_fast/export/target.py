"""The files of one group in one stack's form, and the stack's configuration of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from merit_fast.export.chosen import Group
from merit_fast.export.folder import IMAGES
from merit_fast.export.form import Form, Names
from merit_fast.export.rows import PartRows
from merit_fast.export.settings import Settings
from merit_fast.export.stacks.axolotl import axolotl_config, axolotl_form
from merit_fast.export.stacks.llamafactory import llamafactory_config, llamafactory_form, needs_mask
from merit_fast.export.stacks.swift import swift_config, swift_forms
from merit_fast.export.stacks.trl import trl_config, trl_forms
from merit_fast.export.survey import Survey, survey
from merit_fast.export.write import write_rows

Stack = Literal["axolotl", "llamafactory", "swift", "trl"]


@dataclass(frozen=True)
class RowFile:
    """A file of one part of one group: its name, number, description and rows."""

    name: str
    number: int  # from 1; equal for the training and held-out rows of the same datasets
    form: Form
    members: tuple[tuple[PartRows, Form], ...]


def surveys_of(groups: Iterable[Group]) -> dict[str, Survey]:
    """Dataset -> what the rows of all these groups hold."""
    parts: dict[str, list[PartRows]] = {}
    for group in groups:
        for part in (*group.train, *group.held_out):
            parts.setdefault(part.name, []).append(part)
    return {name: survey(rows) for name, rows in parts.items()}


def plan_files(
    stack: Stack, group: Group, surveys: Mapping[str, Survey], names: Names
) -> tuple[list[RowFile], list[RowFile]]:
    """The files of the training rows and of the held-out rows.

    Raises:
        InputError: the stack cannot train on a row as the run does.
    """
    found = [surveys[part.name] for part in group.train]
    if stack in ("trl", "swift"):
        forms = trl_forms(found) if stack == "trl" else swift_forms(found)
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
) -> list[RowFile]:
    """The files of one part: STEM.jsonl, STEM.2.jsonl and so on."""
    members: dict[int, list[tuple[PartRows, Form]]] = {}
    for part in rows:
        form, number = by_name[part.name]
        members.setdefault(number, []).append((part, form))
    return [
        RowFile(f"{stem}{_suffix('.', number)}.jsonl", number, own[0][1], tuple(own))
        for number, own in sorted(members.items())
    ]


def _suffix(separator: str, number: int) -> str:
    return f"{separator}{number}" if number > 1 else ""


def write_files(files: Sequence[RowFile], unfinished: Path, folder: Path, names: Names) -> int:
    """Writes files into ``unfinished``, which becomes ``folder``; returns the number of rows."""
    return sum(
        write_rows(unfinished / file.name, file.members, names, folder / IMAGES) for file in files
    )


@dataclass(frozen=True)
class Target:
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
        self, files: tuple[list[RowFile], list[RowFile]], found: Sequence[Survey]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The configuration, and entries of dataset_info.json."""
        if self.stack == "llamafactory":
            return self._llamafactory(files, found)
        train, held_out = (
            [(str(self.folder / file.name), file.form) for file in part] for part in files
        )
        if self.stack == "axolotl":
            return axolotl_config(train, held_out, self.settings, self.user, self.group), {}
        if self.stack == "swift":
            files_of_train = [path for path, _ in train]
            own = (files_of_train, self.settings, self.user, self.group)
            return swift_config(*own, num_rows=self.num_rows), {}
        config = trl_config(train, self.settings, self.user, self.group, num_rows=self.num_rows)
        return config, {}

    def _llamafactory(
        self, files: tuple[list[RowFile], list[RowFile]], found: Sequence[Survey]
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
