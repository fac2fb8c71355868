"""units/units.jsonl: a line for every start and end of a unit, of all drivers of a run."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from merit_fast.manifests.atomic import naming
from merit_fast.manifests.ledger import UNITS_FOLDER

JOURNAL = "units.jsonl"  # in UNITS_FOLDER


@dataclass(frozen=True)
class History:
    """What the journal tells about one unit.

    Attributes:
        host: machine of its last end; "" if it has not ended.
        seconds: from its last start to its last end, as the driver saw them.
        failures: times that it has failed since it last was done.
    """

    host: str = ""
    seconds: float = 0.0
    failures: int = 0


def write_event(folder: Path, event: dict[str, Any]) -> None:
    """Adds a line to the journal in ``folder``."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, **event}) + "\n"
    path = folder / JOURNAL
    with naming(path), path.open("a+b") as file:
        if file.tell() and not _ends_line(file):  # of a driver that died in the middle of it
            line = "\n" + line
        file.write(line.encode())


def _ends_line(file: BinaryIO) -> bool:
    """Whether the last byte of a file is the end of a line."""
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_histories(root: Path) -> dict[str, History]:
    """Unit -> its history, of a run's output; empty where no driver has worked."""
    histories: dict[str, History] = {}
    for event in _ends(root / UNITS_FOLDER / JOURNAL):
        name = str(event["unit"])
        failed = event.get("code") != 0
        failures = histories[name].failures + 1 if name in histories and failed else int(failed)
        host = str(event.get("host", ""))
        histories[name] = History(host, float(event.get("seconds", 0.0)), failures)
    return histories


def _ends(file: Path) -> Iterator[dict[str, Any]]:
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # a driver died in the middle of this line
            continue
        if isinstance(event, dict) and event.get("event") == "end" and "unit" in event:
            yield event
