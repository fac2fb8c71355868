"""The sketch of one dataset at a time: its chosen examples, pass by pass, into its sums."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from merit_fast.data import Batch, Dataset, collate
from merit_fast.errors import MeritFastError
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.model import fit_trees, target_losses, tower_parameters
from merit_fast.progress import Task
from merit_fast.row_store.writer import RowWriter
from merit_fast.sketch.capture.layout import RepeatBatch
from merit_fast.sketch.capture.towers import find_towers
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.divided.crew import ONE_PROCESS, Crew
from merit_fast.sketch.examples import NotFiniteError, UpdatedExamples, require_finite
from merit_fast.sketch.mixture.drawing import DrawnDataset, places_in_rows
from merit_fast.sketch.mixture.sampling import next_examples
from merit_fast.sketch.passes.parts import Sketches
from merit_fast.sketch.precondition.moments import NotFiniteMomentsError
from merit_fast.sketch.sketcher import GradientSketcher

# Of adaptive sampling.
FIRST_LOOK = 32
ERROR_RATE = 0.05

# Rows of a dataset, as examples of one update, and their sketches.
SketchedRows = tuple[list[int], UpdatedExamples, Sketches]


@dataclass(frozen=True)
class DatasetSketcher:
    """Sketches datasets with one model.

    Attributes:
        sketcher: entered, of ``model``.
        pad_token_id: of the model's inputs.
        config: of the sketch stage.
        crew: the processes that share the passes; each has the same sums after every turn.
    """

    model: torch.nn.Module
    sketcher: GradientSketcher
    pad_token_id: int
    config: SketchConfig
    crew: Crew = ONE_PROCESS

    def sketch(
        self, drawn: DrawnDataset, task: Task, store: RowWriter | None = None
    ) -> tuple[SketchState, dict[str, SketchState]]:
        """Sketches examples in their order: all, or with ``config.precision`` as many as needed.

        Args:
            drawn: the dataset and its examples.
            task: display.
            store: gets every example's sketch; None: they are not kept.

        Returns:
            The state of the whole, and part -> its state.

        Raises:
            MeritFastError: a row's gradient is not finite; the message names dataset and row.
        """
        dataset = drawn.dataset
        indices = drawn.indices
        state, of_parts = self.sketcher.states_of(dataset.name)
        row_numbers = dataset.source_rows
        places = places_in_rows(dataset)
        while more := next_examples(
            state,
            len(indices),
            self.config.precision,
            first=FIRST_LOOK,
            error_rate=ERROR_RATE,
        ):
            stop = state.num_examples + more
            while state.num_examples < stop:
                for rows, examples, sketches in self._turn(drawn, state.num_examples, stop):
                    self._add(dataset, rows, examples, sketches)
                    if store is not None:
                        tokens = torch.tensor(examples.num_target_tokens)
                        losses = torch.tensor(examples.loss_sums, dtype=torch.float64)
                        numbers = row_numbers[rows]
                        store.append(sketches.whole, numbers, places[rows], losses, tokens)
                    task.advance(len(rows), dataset.name)
        task.skip(len(indices) - state.num_examples)  # examples that were not needed
        for of_rows in (state, *of_parts.values()):
            of_rows.add_shared_rows(drawn.blocks.shared_rows(0, state.num_examples))
        for states in (self.sketcher.state, *self.sketcher.part_state.values()):
            del states[dataset.name]
        return state, of_parts

    def collect(self, drawn: DrawnDataset, update: Callable[[], None], task: Task) -> None:
        """Calls ``update`` after the backward pass of every batch of examples.

        Raises:
            MeritFastError: a gradient is not finite; the message names dataset and rows.
        """
        dataset = drawn.dataset
        indices = drawn.indices
        done = 0
        while done < len(indices):
            rows = indices[done : done + self._rows_of_pass()]
            batch, numbers = self._collated(dataset, rows)
            try:
                _backward(self.model, batch, numbers, len(rows))
                if self.sketcher.is_checking and self.config.check == "first":
                    self.sketcher.take()  # and run again, as for sums
                    continue
                update()
            except RepeatBatch:
                self.sketcher.discard()
                continue
            except NotFiniteMomentsError as error:
                places = [int(dataset.source_rows[row]) for row in rows]
                raise MeritFastError(
                    f"sketch: {dataset.name}: one of the rows {places}, counted from 0: {error}"
                ) from None
            done += len(rows)
            task.advance(len(rows), dataset.name)

    def _rows_of_pass(self) -> int:
        """Rows of a backward pass.

        A tower whose images all have one size sees [images, ...], and rows have unlike numbers of
        images: where such a tower is sketched, each row takes a pass of its own.
        """
        sketched = tower_parameters(self.model).keys() & set(self.sketcher.parameter_names)
        if self.sketcher.slow_parameters:
            return 1
        return 1 if sketched and not find_towers(self.model) else self.config.batch_size

    def _collated(self, dataset: Dataset, rows: Sequence[int]) -> tuple[Batch, list[int]]:
        """Some rows as one batch, and the number of the row that each text of it belongs to."""
        with torch.no_grad():
            texts, numbers = fit_trees(self.model, [dataset.examples[row] for row in rows])
        return collate(texts, [0] * len(texts), self.pad_token_id), numbers

    def _turn(self, drawn: DrawnDataset, start: int, stop: int) -> list[SketchedRows]:
        """Sketches the next rows of a dataset, one pass in each process.

        Returns:
            The passes in the order of the rows; none if the rows are to be sketched again.
        """
        step = self._rows_of_pass()
        firsts = [*range(start, stop, step)][: self.crew.size]
        # Without rows of its own a process runs the first pass too: FSDP2 gathers for all at once.
        first = firsts[self.crew.rank if self.crew.rank < len(firsts) else 0]
        with self.crew.together():
            sketched = self._sketch_pass(drawn, slice(first, min(first + step, stop)))
        if self.crew.size == 1:
            return [] if sketched is None else [sketched]
        if sketched is not None:
            sketched = (*sketched[:2], sketched[2].cpu())
        turns = self.crew.exchange((self.sketcher.slow_parameters, sketched))
        for slow, _ in turns:
            self.sketcher.add_slow(slow)
        passes = [found for _, found in turns[: len(firsts)] if found is not None]
        return passes if len(passes) == len(firsts) else []

    def _add(
        self, dataset: Dataset, rows: Sequence[int], examples: UpdatedExamples, sketches: Sketches
    ) -> None:
        try:
            self.sketcher.add(examples, sketches)
        except NotFiniteError as error:
            raise self._named(dataset, rows, error) from None

    def _sketch_pass(self, drawn: DrawnDataset, chosen: slice) -> SketchedRows | None:
        """Sketches some rows, which are not added; None: they are to be sketched again.

        The first pass of a kind is checked and then run again: its weights have gradients, which
        may change how it rounds. So the check leaves every sum as it is. More parameters may take a
        backward pass per example then, so the caller chooses the rows again: sums depend on no
        other dataset.
        """
        sketcher = self.sketcher
        dataset = drawn.dataset
        rows = drawn.indices[chosen]
        batch, numbers = self._collated(dataset, rows)
        names = [dataset.name] * len(rows)
        try:
            losses = _backward(self.model, batch, numbers, len(rows))
            if not (sketcher.is_checking and self.config.check == "first"):
                examples = UpdatedExamples.of(names, *losses, drawn.blocks.blocks[chosen])
                return rows, examples, sketcher.take_for(examples, numbers)
            require_finite(sketcher.take(row_examples=numbers), names)
        except RepeatBatch:
            sketcher.discard()
        except NotFiniteError as error:
            raise self._named(dataset, rows, error) from None
        return None

    def _named(
        self, dataset: Dataset, rows: Sequence[int], error: NotFiniteError
    ) -> MeritFastError:
        row = dataset.source_rows[rows[error.example]]
        return MeritFastError(
            f"sketch: {dataset.name}: row {row}, counted from 0: must have a finite gradient in "
            f"{self.config.dtype}, found NaN or infinity"
        )


def _backward(
    model: torch.nn.Module, batch: Batch, numbers: list[int], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the backward pass of the examples' mean losses; returns their sums and token counts."""
    losses = target_losses(model, batch)
    example = torch.tensor(numbers, device=losses.example.device)[losses.example]
    zeros = losses.loss.new_zeros(size)
    per_example = zeros.index_add(0, example, losses.loss)
    counts = zeros.index_add(0, example, torch.ones_like(losses.loss))
    (per_example / counts).sum().backward()  # type: ignore[no-untyped-call]
    sums = zeros.double().index_add(0, example, losses.loss.detach().double())
    return sums, counts.long()
