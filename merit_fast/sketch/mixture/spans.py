"""Spans: runs of a dataset's examples whose sums any process can make, added up in their order.

    S = ((S_1 + S_2) + S_3) + ..., S_i the sums of span i alone

The spans follow from the options and the draw only. So the sums have the same bits whether one
process sketches all spans or many sketch some. spans/DATASET/ in an output holds, until the dataset
is finished, a file of sums for each span, its rows, and datasets.json as the output does.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merit_fast.manifests.sketch_state import SketchState, state_path
from merit_fast.row_store.identity import StoreIdentity
from merit_fast.row_store.reuse import reuse_rows
from merit_fast.row_store.writer import ROWS_FOLDER, RowWriter
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.mixture.drawing import DrawnDataset
from merit_fast.sketch.mixture.files import write_states
from merit_fast.sketch.mixture.reuse import read_check, record_state, reuse_states

_SPANS_FOLDER = "spans"


@dataclass(frozen=True)
class Spans:
    """The spans of one dataset in an output.

    Attributes:
        drawn: the dataset, of several spans.
        output: the output under its temporary name.
        config: of the sketch stage.
    """

    drawn: DrawnDataset
    output: Path
    config: SketchConfig

    @property
    def folder(self) -> Path:
        """The folder of their files."""
        return self.output / _SPANS_FOLDER / self.drawn.name

    def reuse(self, earlier: Sequence[Path]) -> set[int]:
        """Takes over the spans that a killed run or an earlier output has; returns their numbers.

        Args:
            earlier: outputs that may hold spans; absent folders count as empty.
        """
        spans = [self.drawn.of_span(number) for number in range(self.drawn.num_spans)]
        sums = {_name(number): span.sums for number, span in enumerate(spans)}
        folders = [folder / _SPANS_FOLDER / self.drawn.name for folder in earlier]
        kept, taken = reuse_states(self.folder, folders, sums, tuple(self.config.parts or ()))
        known = kept | taken
        if self.config.store:
            rows = {_name(number): span.stored for number, span in enumerate(spans)}
            known &= reuse_rows(self.folder, folders, rows)
        return {number for number in range(len(spans)) if _name(number) in known}

    def place(self, number: int) -> tuple[DrawnDataset, Path, str]:
        """One span: its examples, and folder and name of its files."""
        return self.drawn.of_span(number), self.folder, _name(number)

    def add_up(self) -> None:
        """Writes the dataset's sums, rows and record from those of all spans, and removes these."""
        state = self._sum("")
        of_parts = {part: self._sum(part) for part in self.config.parts or ()}
        if self.config.store:
            self._join_rows(state)
        write_states(self.output, self.drawn.name, state, of_parts)
        check = read_check(self.folder)
        record_state(self.output, self.drawn.name, self.drawn.sums, check, tuple(of_parts))
        shutil.rmtree(self.folder)

    def _sum(self, part: str) -> SketchState:
        first, *others = (
            state_path(self.folder, _name(number), part) for number in range(self.drawn.num_spans)
        )
        total = SketchState.read(first)
        for file in others:
            total.merge(SketchState.read(file))
        return total

    def _join_rows(self, state: SketchState) -> None:
        identity = StoreIdentity.of(state.identity, self.config.store_dim)
        writer = RowWriter(self.output / ROWS_FOLDER / self.drawn.name, identity, self.drawn.stored)
        for number in range(self.drawn.num_spans):
            writer.append_folder(self.folder / ROWS_FOLDER / _name(number))
        writer.finish()


def remove_spans(output: Path) -> None:
    """Removes the spans that dead runs of other options or datasets have left."""
    folder = output / _SPANS_FOLDER
    if folder.exists():
        shutil.rmtree(folder)


def _name(number: int) -> str:
    return f"{number:05d}"
