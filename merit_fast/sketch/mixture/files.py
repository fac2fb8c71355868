"""Writes the sums of one dataset, or of one of its spans."""

from collections.abc import Mapping
from pathlib import Path

from merit_fast.manifests.atomic import write_bytes
from merit_fast.manifests.sketch_state import SketchState, state_path


def write_states(
    directory: Path, name: str, state: SketchState, of_parts: Mapping[str, SketchState]
) -> None:
    """Writes a dataset's sums, those of the whole last."""
    for part, of_part in of_parts.items():
        file = state_path(directory, name, part)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, of_part.to_bytes())
    write_bytes(state_path(directory, name), state.to_bytes())
