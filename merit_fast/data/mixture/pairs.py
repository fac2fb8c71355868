"""Finds the training rows of held-out rows that a file of another stack lists apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merit_fast.data.mixture.folder import dataset_of_file

Entry = dict[str, Any]


def training_entry(entries: Sequence[Entry], held_out: Entry) -> Entry | None:
    """Finds the entry that held-out rows belong to; None if there is not exactly one.

    It is the entry of the same path, else the only entry, else the one whose file has the same
    name but for the word of the split: a.train.jsonl and a.test.jsonl.
    """
    same = [entry for entry in entries if entry["path"] == held_out["path"]]
    if not same and len(entries) == 1:
        same = list(entries)
    if not same:
        name = dataset_of_file(Path(held_out["path"]))
        same = [entry for entry in entries if dataset_of_file(Path(entry["path"])) == name]
    return same[0] if len(same) == 1 else None
