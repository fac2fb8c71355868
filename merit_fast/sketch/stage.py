"""The sketch stage: a model and datasets in, one file of sums per dataset out.

A dataset's sums depend only on the model, the options and its rows, not on its name. datasets.json
holds a fingerprint of these (``reuse``): only new datasets cost time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from merit_fast.data import Dataset
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.atomic import write_bytes
from merit_fast.manifests.sketch_state import SketchState, state_path
from merit_fast.model import freeze_parameters, load_model
from merit_fast.progress import Progress
from merit_fast.row_store.identity import StoreIdentity
from merit_fast.row_store.reuse import reuse_rows
from merit_fast.row_store.writer import ROWS_FOLDER, RowWriter
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.dataset import ERROR_RATE, FIRST_LOOK, DatasetSketcher
from merit_fast.sketch.drawing import (
    RowBlocks,
    assign_blocks,
    choose_examples,
    row_digests,
    rows_fingerprint,
    sums_fingerprint,
)
from merit_fast.sketch.passes.parts import describe_rest
from merit_fast.sketch.reuse import record_state, reuse_states
from merit_fast.sketch.sampling import check_blocks, describe_signal
from merit_fast.sketch.selection import select_parameters
from merit_fast.sketch.sketcher import GradientSketcher


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

    Those of a part of the model go to ``parts/PART/NAME.safetensors``. The loss of an example is
    the mean over its target tokens; with ``config.weight`` "tokens" (the default) its gradient
    counts as often as it has target tokens. A row that several datasets have lies in the same block
    of all. A file that a killed run finished in
    ``directory`` is kept if its dataset, the model and the options are as they were.

    Args:
        earlier: a finished output of any mixture and options. Its undamaged files with equal
            fingerprints are reused; they have the bytes that sketching would give.
        freeze: parameters that training leaves as they are, as ``freeze_parameters`` takes them;
            they are not sketched.

    Raises:
        InputError: a dataset of one example, or of too few rows that no other dataset has; a part
            that matches nothing, or a parameter in two of them; parameters that select nothing;
            blocks too few for ``precision``.
    """
    chosen = {d.name: choose_examples(d, config) for d in datasets}
    if config.precision:
        check_blocks(config.blocks, FIRST_LOOK, max(map(len, chosen.values())), ERROR_RATE)
    digests = {d.name: row_digests(d, chosen[d.name]) for d in datasets}
    blocks = assign_blocks(digests, config.blocks)
    fingerprints = {
        name: sums_fingerprint(rows, blocks[name], model_fingerprint, config, freeze)
        for name, rows in digests.items()
    }
    row_prints = {
        d.name: rows_fingerprint(d, chosen[d.name], fingerprints[d.name], config)
        for d in (datasets if config.store else ())
    }
    kept, reused = reuse_states(directory, earlier, fingerprints, tuple(config.parts or ()))
    stored = reuse_rows(directory, earlier, row_prints)
    if config.store:
        kept &= stored
        reused &= stored
    for names, what in (
        (kept, "were finished by a run that was interrupted, their sketches are kept"),
        (reused, "are as before, their sketches are reused"),
    ):
        if names:
            progress.note(f"sketch: {len(names)} of {len(datasets)} datasets {what}")
    missing = [d for d in datasets if d.name not in kept | reused]
    if missing:
        _sketch_datasets(
            model_path,
            model_fingerprint,
            missing,
            chosen,
            blocks,
            fingerprints,
            row_prints,
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
    blocks: Mapping[str, RowBlocks],
    fingerprints: Mapping[str, str],
    row_prints: Mapping[str, str],
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
            weight=config.weight or "tokens",
            fingerprint=model_fingerprint,
            check=config.check,
            uncovered=config.uncovered,
            parts=config.parts,
            notify=progress.note,
        ) as sketcher,
        progress.task(
            "sketch gradients", sum(len(chosen[d.name]) for d in missing), "examples"
        ) as task,
    ):
        if rest := describe_rest(config.parts or {}, parameters):
            progress.note(rest)
        datasets = DatasetSketcher(model, sketcher, pad_token_id, config)
        for dataset in missing:
            store = None
            if config.store:
                folder = directory / ROWS_FOLDER / dataset.name
                identity = StoreIdentity.of(sketcher.identity, config.store_dim)
                store = RowWriter(folder, identity, row_prints[dataset.name])
            drawn = chosen[dataset.name]
            state, of_parts = datasets.sketch(dataset, drawn, blocks[dataset.name], task, store)
            if store is not None:
                store.finish()
            _write_states(directory, dataset.name, state, of_parts)
            record_state(
                directory,
                dataset.name,
                fingerprints[dataset.name],
                sketcher.checked,
                tuple(of_parts),
            )
            if config.precision:
                signal = describe_signal(state, len(chosen[dataset.name]), first=FIRST_LOOK)
                progress.note(f"{dataset.name}: {signal}")


def _write_states(
    directory: Path, name: str, state: SketchState, of_parts: Mapping[str, SketchState]
) -> None:
    """Writes a dataset's sums, those of the whole last."""
    for part, of_part in of_parts.items():
        file = state_path(directory, name, part)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, of_part.to_bytes())
    write_bytes(state_path(directory, name), state.to_bytes())
