"""rounding.json of a quantised output: the errors of its codes, measured while they are written."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merit_fast.manifests.atomic import write_text
from merit_fast.merge.engine.plan import Shard
from merit_fast.merge.read.files import read_json
from merit_fast.merge.read.remote import Location
from merit_fast.records import record, to_dict

ROUNDING_FILE = "rounding.json"


@record
class Rounding:
    """Errors of rounding values to codes: sums over elements, which add up."""

    elements: int = 0
    largest: float = 0.0  # |value - code * scale|
    squares: float = 0.0  # of the errors
    value_squares: float = 0.0

    def __add__(self, other: "Rounding") -> "Rounding":
        return Rounding(
            self.elements + other.elements,
            max(self.largest, other.largest),
            self.squares + other.squares,
            self.value_squares + other.value_squares,
        )

    @property
    def rms(self) -> float:
        """Root of the mean squared error."""
        return math.sqrt(self.squares / max(self.elements, 1))

    @property
    def relative(self) -> float:
        """Root mean square of the errors as a share of that of the values."""
        return math.sqrt(self.squares / self.value_squares) if self.value_squares else 0.0


def write_shard_roundings(directory: Path, shard: Shard, roundings: Mapping[str, Rounding]) -> None:
    """Keeps a shard's errors until the last shard is there; nothing for a shard without codes."""
    if roundings:
        values = {name: to_dict(rounding) for name, rounding in roundings.items()}
        write_text(_shard_file(directory, shard), json.dumps(values))


def write_roundings(directory: Path, shards: Sequence[Shard]) -> None:
    """Joins the shards' errors into rounding.json and removes their files.

    Keeps a rounding.json whose files a killed run had begun to remove.
    """
    files = [
        _shard_file(directory, shard)
        for shard in shards
        if any(segment.encoding for segment in shard.segments)
    ]
    is_begun = (directory / ROUNDING_FILE).exists() and not all(file.exists() for file in files)
    if not files or is_begun:
        return
    tensors: dict[str, Rounding] = {}
    for file in files:
        values = json.loads(file.read_text())
        tensors |= {name: Rounding(**numbers) for name, numbers in values.items()}
    total = Rounding()
    for name in sorted(tensors):
        total += tensors[name]
    by_tensor = {name: _summary(tensors[name]) for name in sorted(tensors)}
    text = json.dumps({**_summary(total), "by_tensor": by_tensor}, indent=2)
    write_text(directory / ROUNDING_FILE, text + "\n")
    for file in files:
        file.unlink()


def read_rounding(out: Location) -> dict[str, Any]:
    """{"rounding": the errors of a finished output's codes}; {} if it has none."""
    file = out / ROUNDING_FILE
    if not file.exists():
        return {}
    values = read_json(file)
    return {"rounding": {key: values[key] for key in _summary(Rounding())}}


def _summary(rounding: Rounding) -> dict[str, Any]:
    return {
        "elements": rounding.elements,
        "largest_error": rounding.largest,
        "rms_error": rounding.rms,
        "relative_rms_error": rounding.relative,
    }


def _shard_file(directory: Path, shard: Shard) -> Path:
    return directory / f"{shard.file}.{ROUNDING_FILE}"
