"""Describes how rows are written to a file, and what their stack is told about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from merit_fast.export.messages import ImageFiles
from merit_fast.export.rows import ExportRow
from merit_fast.export.survey import Survey

Extra = Callable[[ExportRow, ImageFiles], dict[str, Any]]


@dataclass(frozen=True)
class Names:
    """Columns that an export adds; merit_ comes before a name that rows have already."""

    dataset: str
    id: str
    messages: str
    tools: str
    images: str


@dataclass(frozen=True)
class Form:
    """How one stack reads the rows of one dataset.

    Attributes:
        entry: the stack's own description of the rows, without the file's name.
        extra: columns that are added to each row; None: the stack reads the rows as they came.
        is_joined: all rows share a file, whatever their columns are.
        keeps_columns: rows are written with their own columns, the added ones behind them.
    """

    entry: dict[str, Any]
    extra: Extra | None = None
    is_joined: bool = False
    keeps_columns: bool = True

    def key(self, found: Survey) -> str:
        """Equal for datasets that may share a file: columns of one name have one type in it.

        Readers of JSON lines take the columns from a file's first block, and refuse others.
        """
        if self.is_joined:
            return json.dumps(self.entry, sort_keys=True)
        return json.dumps([self.entry, self.extra is None, sorted(found.shape)], sort_keys=True)


def free_names(surveys: Iterable[Survey]) -> Names:
    """Names of added columns that no row has."""
    taken = {column for found in surveys for column in found.columns}

    def free(name: str) -> str:
        while name in taken:
            name = f"merit_{name}"
        return name

    return Names(*(free(name) for name in ("dataset", "id", "messages", "tools", "images")))


def tools_of(row: ExportRow) -> str | None:
    """The row's tools as JSON text."""
    tools = row.conversation.tools
    return None if tools is None else json.dumps([dict(tool) for tool in tools], ensure_ascii=False)
