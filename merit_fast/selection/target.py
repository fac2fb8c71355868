"""The target of a selection: a dataset of the mixture, or a file of rows that is sketched now."""

from dataclasses import dataclass, replace

from merit_fast.data import Dataset, dataset_fingerprints, load_mixture
from merit_fast.data.config import DatasetConfig
from merit_fast.data.stops import require_stops
from merit_fast.errors import InputError, show
from merit_fast.manifests.hashes import checksum
from merit_fast.manifests.io import fingerprint
from merit_fast.manifests.locks import exclusive
from merit_fast.manifests.stages import FACTORS_FILE, SKETCH
from merit_fast.options.parser import to_plain
from merit_fast.pipeline.data import TARGETS_FOLDER, RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.progress import Progress
from merit_fast.row_store.rows import Rows, open_rows


@dataclass(frozen=True)
class TargetRows:
    """Rows that ``--target`` names.

    Attributes:
        name: of the dataset.
        outside: the entry of rows that are not in the mixture; None: a dataset of the mixture.
    """

    name: str
    outside: DatasetConfig | None = None


def read_target(text: str, outputs: Outputs) -> TargetRows:
    """Reads NAME or NAME=PATH; no row is read.

    Raises:
        InputError: NAME is no dataset of the mixture, or is one and has a path.
    """
    name, equals, path = text.partition("=")
    names = [entry.name for entry in outputs.config.mixture]
    if not equals and name in names:
        return TargetRows(name)
    if not equals:
        listed = ", ".join(names)
        raise InputError(f"--target: must be one of {listed}, or NAME=PATH, found {show(name)}")
    if name in names:
        raise InputError(
            f"--target: NAME of NAME=PATH must not be in the mixture, found {show(name)}"
        )
    try:
        return TargetRows(name, DatasetConfig(name, path))
    except InputError as error:
        raise InputError(f"--target: {error}") from None


def sketch_target(entry: DatasetConfig, rows: Rows, outputs: Outputs, progress: Progress) -> Rows:
    """Sketches rows that are not in the mixture as the run's rows, unless that was done before.

    Model, template and options are the run's; at most ``split.examples`` rows are sketched. The
    sketches stay in the run's output, under the fingerprint of all that they depend on.

    Args:
        entry: name and path of the rows.
        rows: the run's stored rows, which give the width.
        outputs: the run's.
        progress: display of the work.

    Raises:
        InputError: the rows cannot be read.
    """
    config = replace(outputs.config.split.sketch_config(), store=True, store_dim=rows.width)
    base = str(outputs.base)
    data = outputs.config.data
    hashes = outputs.records.hashes
    contents = dataset_fingerprints([entry], data, base, part="train", file_hash=hashes)
    freeze = outputs.config.train.freeze
    factors = None
    if config.normalize == "kfac":  # the target's own would give other inner products
        factors = outputs.folder(SKETCH) / FACTORS_FILE
    plain = to_plain(config)
    parts = [entry.name, contents[entry.name], outputs.start_fingerprint, plain, freeze]
    if factors is not None:
        parts.append(checksum(factors))
    directory = outputs.root / TARGETS_FOLDER / fingerprint(parts)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(directory.with_name(f"{directory.name}.lock")):
        from merit_fast.sketch import sketch_mixture

        dataset, pad_token_id = _load(entry, outputs, progress)
        sketch_mixture(
            str(outputs.start),
            outputs.start_fingerprint,
            [dataset],
            pad_token_id,
            config,
            directory,
            progress,
            freeze=freeze,
            factors=factors,
        )
    return open_rows(directory)


def _load(entry: DatasetConfig, outputs: Outputs, progress: Progress) -> tuple[Dataset, int]:
    """The dataset, tokenized as a run does it, and the token that pads."""
    run_data = RunData(outputs, progress, writes=False)
    config = outputs.config.data
    [dataset] = load_mixture([entry], run_data.processor, config, part="train", progress=progress)
    require_stops([dataset], [entry], config, run_data.processor)
    for note in dataset.notes:
        progress.note(f"{entry.name}: {note}")
    return dataset, run_data.pad_token_id
