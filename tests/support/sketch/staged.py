"""Small runs of the sketch stage."""

from pathlib import Path
from typing import Any

import numpy as np
from support.runs import Notes

from merit_fast.data import Dataset, Example
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.mixture.stage import sketch_mixture


def example(ids: Any) -> Example:
    ids = np.array(ids, np.int32)
    return Example(ids, np.where(np.arange(len(ids)) < 3, -100, ids).astype(np.int32))


def datasets() -> list[Dataset]:
    numbers = np.random.default_rng(0)
    clear = Dataset(
        "clear", (example([5, 9, 11, 20, 30, 40]),) * 80
    )  # one row again and again: no noise at all
    mixed = Dataset("mixed", tuple(example(numbers.integers(5, 90, 7)) for _ in range(80)))
    return [clear, mixed]


def sketch(model: Path, folder: Path, **options: Any) -> tuple[dict[str, SketchState], list[str]]:
    """Runs the stage on ``datasets``; returns the states and the notes."""
    options = {"proj_dim": 4096, "dtype": "fp32", "batch_size": 16, "examples": 80, **options}
    progress = Notes()
    sketch_mixture(
        str(model), "fingerprint", datasets(), 1, SketchConfig(**options), folder, progress
    )
    states = {name: SketchState.read(folder / f"{name}.safetensors") for name in ("clear", "mixed")}
    return states, progress.notes
