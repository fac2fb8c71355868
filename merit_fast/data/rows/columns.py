"""Finds in which columns of a dataset's rows the values lie that a format reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merit_fast.data.rows.values import is_empty

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A value that a format reads, by the name of its column.

    Attributes:
        aliases: other columns that hold it where a row has none of that name.
        is_required: whether a row without it is of another format.
        description: one line for the docs.
    """

    name: str
    aliases: tuple[str, ...] = ()
    is_required: bool = False
    description: str = ""


COMMON = (
    Column("system", ("system_prompt",), description="a system message, unless the row has one"),
    Column("tools", ("functions",), description="tools: a list, or JSON text of one"),
    Column("images", ("image",), description="an image or a list of them"),
    Column("chat_template_kwargs", description="arguments of the chat template for this row"),
    Column("parallel_tool_calls", description="handed to the chat template as an argument"),
    Column("keep_if", description="false: the row is left out; read only if `columns` names it"),
)


class Columns:
    """The values of one row under the names that its format reads.

    Args:
        row: the row.
        sources: name -> the columns that may hold it; the first that holds a value is read.
        place: the row's place, for error messages.
    """

    def __init__(self, row: Row, sources: Mapping[str, Sequence[str]], place: str) -> None:
        self._row = row
        self._sources = sources
        self.place = place

    def column(self, name: str) -> str:
        """The column that is read for ``name``; the first candidate if none holds a value."""
        columns = self._sources[name]
        if len(columns) > 1:
            return next((c for c in columns if not is_empty(self._row[c])), columns[0])
        return columns[0]

    def get(self, name: str) -> Any:
        """The value of ``name``, None if no column holds it."""
        return self._row[self.column(name)] if name in self._sources else None

    def where(self, name: str) -> str:
        """The place of ``name``, for error messages."""
        return f"{self.place}: {self.column(name) if name in self._sources else name}"

    def unread(self) -> list[str]:
        """Columns that hold a value but are not read, in the row's order."""
        read = {self.column(name) for name in self._sources}
        return [c for c, value in self._row.items() if c not in read and not is_empty(value)]


def sources_of(
    columns: Sequence[str], wanted: Sequence[Column], mapping: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Name -> columns of a row that may hold it, for the names that the row has.

    Args:
        columns: the columns of the row.
        wanted: the columns of a format.
        mapping: an entry's ``columns``; a column that it gives to one name serves no other.
    """
    taken = set(mapping.values())
    sources = {}
    for column in wanted:
        if column.name in mapping:
            candidates: tuple[str, ...] = (mapping[column.name],)
        elif column.name == "keep_if":
            candidates = ()
        else:
            candidates = tuple(c for c in (column.name, *column.aliases) if c not in taken)
        if found := tuple(c for c in candidates if c in columns):
            sources[column.name] = found
    return sources
