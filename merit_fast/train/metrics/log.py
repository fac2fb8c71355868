"""metrics.jsonl: one line for every step and every measurement, right also after kill -9."""

import json
import os
from pathlib import Path

from merit_fast.errors import InputError
from merit_fast.manifests.atomic import write_text
from merit_fast.train.metrics.record import HeldOutRecord, StepRecord

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """The file metrics.jsonl of a branch in training.

    Args:
        directory: the branch's folder.
        step: steps done; lines of later steps, which a killed run wrote after its last
            checkpoint, are removed.
        num_measured: measurements on held-out rows so far.

    Raises:
        InputError: the file lacks one of them.
    """

    def __init__(self, directory: Path, step: int, num_measured: int) -> None:
        self.path = directory / METRICS_FILE
        lines = _lines_until(self.path, step)
        steps = [number for number, is_step, _ in lines if is_step]
        if steps != list(range(1, step + 1)) or len(lines) != step + num_measured:
            raise InputError(
                f"{self.path}: must have a line for each of the {step} steps and {num_measured} "
                f"measurements before the checkpoint, got {len(lines)} lines; remove the folder to "
                "train the branch from its start"
            )
        write_text(self.path, "".join(line for _, _, line in lines))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: StepRecord | HeldOutRecord) -> None:
        """Adds a line; a killed process leaves it whole, or cut as the last one."""
        self._file.write(json.dumps(record.values()) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Waits until the lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def _lines_until(path: Path, step: int) -> list[tuple[int, bool, str]]:
    """(step, whether it is a training step, line) of every whole line of these steps."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            values = json.loads(line) if line.endswith("\n") else {}
        except ValueError:
            values = {}
        if not isinstance(values, dict) or values.get("step", step + 1) > step:
            break
        lines.append((values["step"], "loss" in values, line))
    return lines
