"""The sketch stage: a model and datasets in, one file of sums per dataset out.

A dataset's sums depend only on the model, the options and its rows, not on its name. datasets.json
holds a fingerprint of these (``reuse``): only new datasets cost time. With ``normalize: kfac`` the
sums depend on the rows of all datasets too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from merit_fast.data import Dataset
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.atomic import write_bytes
from merit_fast.model import freeze_parameters, load_model
from merit_fast.progress import Progress
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.dataset import ERROR_RATE, FIRST_LOOK, DatasetSketcher
from merit_fast.sketch.drawing import (
    choose_examples,
    preconditioner_fingerprint,
    sums_fingerprint,
)
from merit_fast.sketch.multipliers import keep_factors, stage_multipliers
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
    source = preconditioner_fingerprint(datasets, chosen, model_fingerprint, config, freeze)
    fingerprints = {
        d.name: sums_fingerprint(d, chosen[d.name], model_fingerprint, config, freeze, source)
        for d in datasets
    }
    kept, reused = reuse_states(directory, earlier, fingerprints)
    keep_factors(config, source, directory, earlier)
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
            datasets,
            missing,
            chosen,
            fingerprints,
            source,
            pad_token_id,
            config,
            directory,
            progress,
            freeze,
        )


def _sketch_datasets(  # noqa: PLR0913
    model_path: str,
    model_fingerprint: str,
    datasets: Sequence[Dataset],
    missing: Sequence[Dataset],
    chosen: Mapping[str, list[int]],
    fingerprints: Mapping[str, str],
    source: str | None,
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
    work = [(dataset, chosen[dataset.name]) for dataset in datasets]
    multipliers = stage_multipliers(
        model, parameters, work, source, pad_token_id, config, directory, progress
    )
    with (
        GradientSketcher(
            model,
            sketch,
            parameters,
            multipliers.scales,
            multipliers.factors,
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
        passes = DatasetSketcher(model, sketcher, pad_token_id, config)
        for dataset in missing:
            state = passes.sketch(dataset, chosen[dataset.name], task)
            write_bytes(directory / f"{dataset.name}.safetensors", state.to_bytes())
            record_state(directory, dataset.name, fingerprints[dataset.name], sketcher.checked)
            if config.precision:
                signal = describe_signal(state, len(chosen[dataset.name]), first=FIRST_LOOK)
                progress.note(f"{dataset.name}: {signal}")
