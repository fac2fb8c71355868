"""Sketch states of a training run: summed over its ranks, one file per dataset in a folder."""

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from torch import distributed as dist

from merit_fast.errors import InputError
from merit_fast.manifests.directories import commit_directory
from merit_fast.manifests.locks import exclusive, locks_of
from merit_fast.manifests.sketch_state import SketchState


def read_states(folder: str | Path) -> dict[str, SketchState]:
    """Reads the states of a ``sketches`` folder, by dataset.

    Raises:
        InputError: the folder is absent, or a file is no sketch state.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: is not a folder of sketches")
    return {
        unquote(file.stem): SketchState.read(file)
        for file in sorted(Path(folder).glob("*.safetensors"))
    }


def file_stem(name: str) -> str:
    """Name of a dataset's file, without its ending."""
    return quote(name, safe=" ")


def write_states(folder: Path, states: Mapping[Any, SketchState]) -> None:
    """Replaces ``folder``, one file per dataset.

    A crash leaves the old folder or none, never an incomplete one. Processes take turns.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    with exclusive(locks_of(folder) / "write"):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, state in states.items():
            file = temporary / f"{file_stem(str(name))}.safetensors"
            file.write_bytes(state.to_bytes())
        commit_directory(temporary, folder)


def sum_over_ranks(states: Mapping[Any, SketchState]) -> dict[Any, SketchState]:
    """Adds all ranks' states, dataset by dataset, on rank 0; elsewhere returns the rank's own."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(states)
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, sorted(states))
    summed = dict(states)
    is_first = dist.get_rank() == 0
    for name in sorted({name for of_rank in names for name in of_rank}):
        gathered: list[Any] | None = [None] * dist.get_world_size() if is_first else None
        dist.gather_object(states.get(name), gathered, dst=0)
        present = [state for state in gathered or () if state is not None]
        if present:
            summed[name] = copy.deepcopy(present[0])
            for state in present[1:]:
                summed[name].merge(state)
    return summed
