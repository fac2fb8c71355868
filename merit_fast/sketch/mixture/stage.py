"""The sketch stage: a model and datasets in, one file of sums per dataset out.

A dataset's sums depend only on the model, the options and its rows, not on its name. datasets.json
holds a fingerprint of these (``reuse``): only new datasets cost time. With ``normalize: kfac`` the
sums depend on the rows of all datasets too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merit_fast.data import Dataset
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.atomic import write_bytes
from merit_fast.manifests.sketch_state import SketchState, state_path
from merit_fast.model import freeze_parameters
from merit_fast.model.layered.choose import load_model_for
from merit_fast.progress import Progress, Task
from merit_fast.row_store.identity import StoreIdentity
from merit_fast.row_store.reuse import reuse_rows
from merit_fast.row_store.writer import ROWS_FOLDER, RowWriter
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.mixture.dataset import ERROR_RATE, FIRST_LOOK, DatasetSketcher
from merit_fast.sketch.mixture.drawing import DrawnDataset, DrawnMixture, draw_mixture
from merit_fast.sketch.mixture.multipliers import keep_factors, stage_multipliers
from merit_fast.sketch.mixture.reuse import record_state, reuse_states
from merit_fast.sketch.mixture.sampling import check_blocks, describe_signal
from merit_fast.sketch.passes.parts import describe_rest
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
    earlier: Sequence[Path] = (),
    freeze: Sequence[str] | None = None,
    factors: Path | None = None,
    only: str | None = None,
) -> None:
    """Sketches every dataset's per-example gradients into one ``NAME.safetensors`` of sums.

    The sums of a part of the model go to ``parts/PART/NAME.safetensors``. The loss of an example is
    the mean over its target tokens. With ``config.weight`` "tokens" (the default) its gradient
    counts as often as it has target tokens. A row that several datasets have lies in the same block
    of all. A file that a killed run finished in ``directory`` is kept if its dataset, the model and
    the options are as they were.

    Args:
        earlier: finished outputs of any mixture and options. Their undamaged files with equal
            fingerprints are reused; they have the bytes that sketching would give.
        freeze: parameters that training leaves as they are, as ``freeze_parameters`` takes them;
            they are not sketched.
        factors: file of the K-FAC factors that ``normalize`` kfac multiplies by; None: those of
            these datasets are collected first.
        only: the one dataset to sketch; the others only decide the blocks of shared rows. None:
            all.

    Raises:
        InputError: a dataset of one example, or of too few rows that no other dataset has; a part
            that matches nothing, or a parameter in two of them; parameters that select nothing;
            blocks too few for ``precision``.
    """
    mixture = draw_mixture(datasets, model_fingerprint, config, freeze, factors)
    if config.precision:
        check_blocks(config.blocks, FIRST_LOOK, mixture.most_examples, ERROR_RATE)
    if only is not None:
        mixture = mixture.only(only)
    missing = _reuse(mixture, config, directory, progress, earlier)
    if missing:
        work = SketchWork(
            model_path, model_fingerprint, pad_token_id, config, directory, freeze, factors
        )
        _sketch_datasets(work, mixture, missing, progress)


@dataclass(frozen=True)
class SketchWork:
    """The arguments of ``sketch_mixture`` that every dataset shares."""

    model_path: str
    model_fingerprint: str
    pad_token_id: int
    config: SketchConfig
    directory: Path
    freeze: Sequence[str] | None
    factors: Path | None


def _reuse(
    mixture: DrawnMixture,
    config: SketchConfig,
    directory: Path,
    progress: Progress,
    earlier: Sequence[Path],
) -> list[DrawnDataset]:
    """Takes over what is known already; returns the datasets that are not."""
    sums = {drawn.name: drawn.sums for drawn in mixture.datasets}
    rows = {drawn.name: drawn.stored for drawn in mixture.datasets if config.store}
    kept, reused = reuse_states(directory, earlier, sums, tuple(config.parts or ()))
    stored = reuse_rows(directory, earlier, rows)
    keep_factors(config, mixture.multipliers, directory, earlier)
    if config.store:
        kept &= stored
        reused &= stored
    for names, what in (
        (kept, "were finished by a run that was interrupted, their sketches are kept"),
        (reused, "are as before, their sketches are reused"),
    ):
        if names:
            progress.note(f"sketch: {len(names)} of {len(mixture.datasets)} datasets {what}")
    return [drawn for drawn in mixture.datasets if drawn.name not in kept | reused]


def _sketch_datasets(
    work: SketchWork,
    mixture: DrawnMixture,
    missing: Sequence[DrawnDataset],
    progress: Progress,
) -> None:
    config = work.config
    memory = "whole" if config.normalize == "adam" else config.memory
    model = load_model_for(
        work.model_path, config.dtype, memory, lambda line: progress.note(f"sketch: {line}")
    )
    freeze_parameters(model, work.freeze)
    parameters = select_parameters(model, config.parameters)
    multipliers = stage_multipliers(
        model,
        parameters,
        mixture,
        work.pad_token_id,
        config,
        work.directory,
        progress,
        work.factors,
    )
    with (
        GradientSketcher(
            model,
            CountSketch(config.proj_dim, config.seed),
            parameters,
            multipliers.scales,
            multipliers.factors,
            blocks=config.blocks,
            weight=config.weight or "tokens",
            fingerprint=work.model_fingerprint,
            check=config.check,
            uncovered=config.uncovered,
            parts=config.parts,
            notify=progress.note,
        ) as sketcher,
        progress.task(
            "sketch gradients", sum(len(drawn.indices) for drawn in missing), "examples"
        ) as task,
    ):
        if rest := describe_rest(config.parts or {}, parameters):
            progress.note(rest)
        passes = DatasetSketcher(model, sketcher, work.pad_token_id, config)
        for drawn in missing:
            state = _sketch_dataset(work, passes, drawn, task)
            if config.precision:
                signal = describe_signal(state, len(drawn.indices), first=FIRST_LOOK)
                progress.note(f"{drawn.name}: {signal}")


def _sketch_dataset(
    work: SketchWork, passes: DatasetSketcher, drawn: DrawnDataset, task: Task
) -> SketchState:
    """Sketches one dataset and writes its rows, its sums and its record; returns the sums."""
    store = None
    if work.config.store:
        identity = StoreIdentity.of(passes.sketcher.identity, work.config.store_dim)
        store = RowWriter(work.directory / ROWS_FOLDER / drawn.name, identity, drawn.stored)
    state, of_parts = passes.sketch(drawn, task, store)
    if store is not None:
        store.finish()
    _write_states(work.directory, drawn.name, state, of_parts)
    checked = passes.sketcher.checked
    record_state(work.directory, drawn.name, drawn.sums, checked, tuple(of_parts))
    return state


def _write_states(
    directory: Path, name: str, state: SketchState, of_parts: Mapping[str, SketchState]
) -> None:
    """Writes a dataset's sums, those of the whole last."""
    for part, of_part in of_parts.items():
        file = state_path(directory, name, part)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, of_part.to_bytes())
    write_bytes(state_path(directory, name), state.to_bytes())
