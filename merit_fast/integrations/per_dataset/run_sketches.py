"""Sketches of every N-th micro-batch of a training run, in its checkpoints and its output."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from merit_fast.errors import InputError
from merit_fast.integrations.per_dataset.codes import BatchDatasets
from merit_fast.integrations.per_dataset.sketches import add_passes, unpacked
from merit_fast.integrations.sketch_files import read_states, sum_over_ranks, write_states
from merit_fast.integrations.trainer import FOLDER
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.sketch.selection import select_parameters
from merit_fast.sketch.summed import SummedSketcher


class RunSketches:
    """Sums of sketched gradients per dataset; ``every=0`` sketches nothing.

    Args:
        every: N of the micro-batches to sketch.
        sketch: width and seed.
        parameters: "all", "blocks" or a regular expression.
        blocks: blocks of each dataset's state.
    """

    def __init__(self, every: int, sketch: CountSketch, parameters: str, blocks: int) -> None:
        if every < 0:
            raise InputError(f"sketch_every: must be at least 0, got {every}")
        self.every = every
        self.sketch = sketch
        self.parameters = parameters
        self.blocks = blocks
        self._sketcher: SummedSketcher | None = None
        self._model: nn.Module | None = None

    def begin(self, model: nn.Module, checkpoint: Path | None, rank: int) -> None:
        """Starts at zero, or with a checkpoint's states on rank 0."""
        if not self.every:
            return
        kept: Mapping[Any, SketchState] = {}
        if checkpoint is not None:
            kept = read_states(checkpoint / FOLDER)
        marks = (state.identity.model_fingerprint.split(": ", 1)[-1] for state in kept.values())
        self._sketcher = SummedSketcher(
            model,
            self.sketch,
            select_parameters(model, self.parameters),
            blocks=self.blocks,
            weight="tokens",
            fingerprint=next(marks, None),
        )
        self._sketcher.restore(kept if rank == 0 else {})
        self._model = model

    def see(self, number: int, inputs: Mapping[str, Any], datasets: BatchDatasets) -> None:
        """Sketches micro-batch ``number`` if it is an N-th one, before its own training step."""
        if self.every and number % self.every == 0:
            assert self._sketcher is not None and self._model is not None  # begin came before
            add_passes(self._model, self._sketcher, unpacked(inputs, datasets))

    def write(self, folder: Path, rank: int) -> None:
        """Writes the states of all ranks; every rank must call it."""
        if self._sketcher is None:
            return
        states = sum_over_ranks(self._sketcher.state)
        if rank == 0:
            write_states(folder / FOLDER, states)
