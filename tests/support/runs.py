"""Configured runs of the tiny model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run
from merit_fast.progress import SilentProgress

# These hold seconds, memory, times of files, or hashes of files that do: no result.
MEASURED = (
    "timing.json",
    "metrics.jsonl",
    "report.html",
    "report.json",
    "arms.csv",
    "run.json",
    "stage.json",
)


def run_values(model: Path, mixture: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A run's YAML as a mapping."""
    return {
        "model": str(model),
        "mixture": mixture,
        "split": {
            "groups": 2,
            "tolerance": 0.2,  # several balanced splits exist, so a random control does
            "examples": 6,
            "proj_dim": 4096,
            "batch_size": 4,
            "dtype": "fp32",
        },
        "train": {
            "epochs": 2,
            "learning_rate": 1e-3,
            "batch_size": 4,
            "dtype": "fp32",
            "controls": {"joint": True, "random": 1, "iid": 0},
            "checkpoint_steps": 2,
            "max_shard_size": "60KB",
        },
        "evaluate": {"interpolate": [0.5], "max_new_tokens": 4, "dtype": "fp32"},
        "output": "out",
    }


class Notes(SilentProgress):
    """Keeps the notes of a run."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def run_all(config_file: Path, *assignments: str) -> tuple[dict[str, Any], set[str]]:
    """Runs all stages; returns the summary and the names of the outputs that were up to date."""
    progress = Notes()
    summary = Run(read_run_config(config_file, assignments), progress).all()
    fresh = [note.split(":")[0] for note in progress.notes if note.endswith("up to date")]
    return summary, set(fresh)
