"""The sketch stage: a model and datasets in, one file of sums per dataset out.

A dataset's sums depend only on the model, the options and its rows, not on its name. datasets.json
holds a fingerprint of these (``reuse``): only new datasets cost time.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from merit_fast.data import Batch, Dataset, collate
from merit_fast.data.shares import draw_rows
from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels.sketch import HASH_VERSION, CountSketch
from merit_fast.manifests.atomic import write_bytes
from merit_fast.manifests.io import fingerprint
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.model import (
    fit_trees,
    freeze_parameters,
    load_model,
    target_losses,
    tower_parameters,
)
from merit_fast.options.parser import to_plain
from merit_fast.progress import Progress, Task
from merit_fast.sketch.capture.layout import RepeatBatch
from merit_fast.sketch.capture.towers import find_towers
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.reuse import record_state, reuse_states
from merit_fast.sketch.sampling import check_blocks, describe_signal, next_examples
from merit_fast.sketch.selection import select_parameters
from merit_fast.sketch.sketcher import GradientSketcher, NotFiniteError, require_finite

# Of adaptive sampling.
FIRST_LOOK = 32
ERROR_RATE = 0.05


def sketch_mixture(  # noqa: PLR0913
    model_path: str,
    model_fingerprint: str,
    datasets: Sequence[Dataset],
    pad_token_id: int,
    config: SketchConfig,
    directory: Path,
    progress: Progress,
    earlier: Path | None = None,
    freeze: Sequence[str] | None = None,
) -> None:
    """Sketches every dataset's per-example gradients into one ``NAME.safetensors`` of sums.

    The loss of an example is the mean over its target tokens. A file that a killed run finished in
    ``directory`` is kept if its dataset, the model and the options are as they were.

    Args:
        earlier: a finished output of any mixture and options. Its undamaged files with equal
            fingerprints are reused; they have the bytes that sketching would give.
        freeze: parameters that training leaves as they are, as ``freeze_parameters`` takes them;
            they are not sketched.

    Raises:
        InputError: a dataset of one example; parameters that select nothing; blocks too few for
            ``precision``.
    """
    chosen = {d.name: choose_examples(d, config) for d in datasets}
    if config.precision:
        check_blocks(config.blocks, FIRST_LOOK, max(map(len, chosen.values())), ERROR_RATE)
    fingerprints = {
        d.name: _fingerprint(d, chosen[d.name], model_fingerprint, config, freeze) for d in datasets
    }
    kept, reused = reuse_states(directory, earlier, fingerprints)
    if reused:
        progress.note(
            f"sketch: {len(reused)} of {len(datasets)} datasets are as before, "
            "their sketches are reused"
        )
    missing = [d for d in datasets if d.name not in kept | reused]
    if missing:
        _sketch_datasets(
            model_path,
            model_fingerprint,
            missing,
            chosen,
            fingerprints,
            pad_token_id,
            config,
            directory,
            progress,
            freeze,
        )


def _sketch_datasets(  # noqa: PLR0913
    model_path: str,
    model_fingerprint: str,
    missing: Sequence[Dataset],
    chosen: Mapping[str, list[int]],
    fingerprints: Mapping[str, str],
    pad_token_id: int,
    config: SketchConfig,
    directory: Path,
    progress: Progress,
    freeze: Sequence[str] | None,
) -> None:
    model = load_model(model_path, config.dtype)
    freeze_parameters(model, freeze)
    parameters = select_parameters(model, config.parameters)
    sketch = CountSketch(config.proj_dim, config.seed)
    with (
        GradientSketcher(
            model,
            sketch,
            parameters,
            blocks=config.blocks,
            fingerprint=model_fingerprint,
            check=config.check,
            uncovered=config.uncovered,
            notify=progress.note,
        ) as sketcher,
        progress.task(
            "sketch gradients", sum(len(chosen[d.name]) for d in missing), "examples"
        ) as task,
    ):
        for dataset in missing:
            state = _sketch_dataset(
                model, sketcher, dataset, chosen[dataset.name], pad_token_id, config, task
            )
            write_bytes(directory / f"{dataset.name}.safetensors", state.to_bytes())
            record_state(directory, dataset.name, fingerprints[dataset.name], sketcher.checked)
            if config.precision:
                signal = describe_signal(state, len(chosen[dataset.name]), first=FIRST_LOOK)
                progress.note(f"{dataset.name}: {signal}")


def choose_examples(dataset: Dataset, config: SketchConfig) -> list[int]:
    """Chooses up to ``config.examples`` examples, at random by the seed and the dataset's content.

        rank = permutation(number of rows in the source) by (seed, content)
        chosen = the first examples in the order of (rank of their row, place)

    So the draw is known before a row is tokenized. A dataset that does not know its source's
    content is drawn by the content of its examples.
    """
    if dataset.num_examples < 2:
        raise InputError(
            f"{dataset.name}: split needs at least 2 examples per dataset, "
            f"got {dataset.num_examples}"
        )
    if dataset.content is None or dataset.num_rows is None:
        content = _content(dataset, range(dataset.num_examples))
        order = draw_rows(content, config.seed, dataset.num_examples)
    else:
        rank = np.argsort(draw_rows(dataset.content, config.seed, dataset.num_rows))
        order = np.argsort(rank[dataset.rows], kind="stable")
        _, first = np.unique(dataset.places[order], return_index=True)
        order = order[np.sort(first)]  # an example that a weight repeats is drawn once
    return [int(index) for index in order[: config.examples]]


def _fingerprint(
    dataset: Dataset,
    indices: list[int],
    model_fingerprint: str,
    config: SketchConfig,
    freeze: Sequence[str] | None,
) -> str:
    """Fingerprint of everything that a dataset's file of sums depends on."""
    rows = _content(dataset, indices)
    media = [dataset.examples[index].media for index in indices]
    images = [item.fingerprint() for item in media if item is not None]
    more: list[object] = [] if freeze is None else [{"freeze": list(freeze)}]
    more += [{"images": images}] if images else []
    # Neither option changes a sum.
    options = {
        key: value for key, value in to_plain(config).items() if key not in ("check", "uncovered")
    }
    return fingerprint([HASH_VERSION, model_fingerprint, options, rows, *more])


def _content(dataset: Dataset, indices: Sequence[int]) -> str:
    rows = hashlib.sha256()
    for index in indices:
        example = dataset.examples[index]
        tree = () if example.tree is None else (example.tree.starts, example.tree.parents)
        for array in (example.input_ids, example.labels, *tree):
            rows.update(len(array).to_bytes(8, "little") + array.astype("<i4").tobytes())
    return rows.hexdigest()


def _sketch_dataset(
    model: torch.nn.Module,
    sketcher: GradientSketcher,
    dataset: Dataset,
    indices: list[int],
    pad_token_id: int,
    config: SketchConfig,
    task: Task,
) -> SketchState:
    """Sketches ``indices`` in their order, all or, with ``config.precision``, as many as needed."""
    state = sketcher.state[dataset.name] = SketchState.zeros(sketcher.identity, config.blocks)
    while more := next_examples(
        state, len(indices), config.precision, first=FIRST_LOOK, error_rate=ERROR_RATE
    ):
        stop = state.num_examples + more
        while state.num_examples < stop:
            start = state.num_examples
            rows = indices[start : min(start + _rows_of_pass(model, sketcher, config), stop)]
            _sketch_batch(model, sketcher, dataset, rows, pad_token_id, config)
            task.advance(len(rows), dataset.name)
    task.skip(len(indices) - state.num_examples)  # examples that were not needed
    return sketcher.state.pop(dataset.name)


def _rows_of_pass(model: torch.nn.Module, sketcher: GradientSketcher, config: SketchConfig) -> int:
    """Rows of a backward pass.

    A tower whose images all have one size sees [images, ...], and rows have unlike numbers of
    images: where such a tower is sketched, each row takes a pass of its own.
    """
    sketched = tower_parameters(model).keys() & set(sketcher.parameter_names)
    if sketcher.slow_parameters:
        return 1
    return 1 if sketched and not find_towers(model) else config.batch_size


def _sketch_batch(
    model: torch.nn.Module,
    sketcher: GradientSketcher,
    dataset: Dataset,
    rows: list[int],
    pad_token_id: int,
    config: SketchConfig,
) -> None:
    """Sketches some rows into the state.

    The first pass of a kind is checked and then run again: its weights have gradients, which may
    change how it rounds. So the check leaves every sum as it is.
    """
    with torch.no_grad():
        texts, numbers = fit_trees(model, [dataset.examples[row] for row in rows])
    batch = collate(texts, [0] * len(texts), pad_token_id)
    names = [dataset.name] * len(rows)
    while True:
        try:
            losses = _backward(model, batch, numbers, len(rows))
            if not (sketcher.is_checking and config.check == "first"):
                sketcher.update(names, *losses, row_examples=numbers)
                return
            require_finite(sketcher.take(row_examples=numbers), names)
        except RepeatBatch:  # more parameters take a backward pass per example
            sketcher.discard()
        except NotFiniteError as error:
            row = dataset.rows[rows[error.example]]
            raise MeritFastError(
                f"sketch: {dataset.name}: row {row}, counted from 0: must have a finite gradient "
                f"in {config.dtype}, found NaN or infinity"
            ) from None


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
