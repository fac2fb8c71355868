"""Sentences of the plan on the rows of a dataset."""

from merit_fast.data.config import DatasetConfig, Part, source
from merit_fast.data.sources import unread_files


def source_notes(config: DatasetConfig, part: Part) -> list[str]:
    """The entry's own sentence, and one on the files of a folder that are not read."""
    notes = [config.note] if config.note and part == "train" else []
    place = source(config, part)
    if place and (unread := unread_files(place)):
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        notes.append(f"files not read: {', '.join(unread[:3])}{more}")
    return notes


def count_of_rows(count: int) -> str:
    """A number of rows in words of a note, such as "1,200 rows"."""
    return f"{count:,} {'row' if count == 1 else 'rows'}"
