"""The sketch stage: a model and datasets in, one file of sums per dataset out.

A dataset's sums depend only on the model, the options, its name and the chosen rows. datasets.json
holds a fingerprint of these, so that the files of an earlier output can be reused: only new
datasets cost time.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from merit_fast.data import Dataset, collate
from merit_fast.errors import InputError
from merit_fast.kernels.sketch import HASH_VERSION, CountSketch
from merit_fast.manifests.atomic import replace_file, write_bytes, write_text
from merit_fast.manifests.io import fingerprint
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.model import load_model, target_losses
from merit_fast.options.parser import to_plain
from merit_fast.progress import Progress, Task
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.gradients import GradientSketcher
from merit_fast.sketch.sampling import check_blocks, describe_signal, next_examples
from merit_fast.sketch.selection import select_parameters

# Of adaptive sampling.
FIRST_LOOK = 32
ERROR_RATE = 0.05
_FINGERPRINTS = "datasets.json"


def sketch_mixture(
    model_path: str,
    model_fingerprint: str,
    datasets: Sequence[Dataset],
    pad_token_id: int,
    config: SketchConfig,
    directory: Path,
    progress: Progress,
    earlier: Path | None = None,
) -> None:
    """Sketches every dataset's per-example gradients into one ``NAME.safetensors`` of sums.

    The loss of an example is the mean over its target tokens. A file that exists is finished, so a
    killed run resumes with the next dataset.

    Args:
        earlier: a finished output of any mixture and options. Its files with equal fingerprints are
            reused; they have the bytes that sketching would give.

    Raises:
        InputError: a dataset of one example; parameters that select nothing; blocks too few for
            ``precision``.
    """
    chosen = {d.name: choose_examples(d, config) for d in datasets}
    if config.precision:
        check_blocks(config.blocks, FIRST_LOOK, max(map(len, chosen.values())), ERROR_RATE)
    fingerprints = {
        d.name: _fingerprint(d, chosen[d.name], model_fingerprint, config) for d in datasets
    }
    missing = [d for d in datasets if not (directory / f"{d.name}.safetensors").exists()]
    if earlier is not None and (
        reused := _reuse(earlier, directory, {d.name: fingerprints[d.name] for d in missing})
    ):
        progress.note(
            f"sketch: {len(reused)} of {len(datasets)} datasets are as before, "
            "their sketches are reused"
        )
        missing = [d for d in missing if d.name not in reused]
    if missing:
        _sketch_datasets(
            model_path,
            model_fingerprint,
            missing,
            chosen,
            pad_token_id,
            config,
            directory,
            progress,
        )
    write_text(directory / _FINGERPRINTS, json.dumps(fingerprints, indent=1, sort_keys=True) + "\n")


def _sketch_datasets(
    model_path: str,
    model_fingerprint: str,
    missing: Sequence[Dataset],
    chosen: Mapping[str, list[int]],
    pad_token_id: int,
    config: SketchConfig,
    directory: Path,
    progress: Progress,
) -> None:
    model = load_model(model_path, config.dtype)
    parameters = select_parameters(model, config.parameters)
    sketch = CountSketch(config.proj_dim, config.seed)
    with (
        GradientSketcher(
            model, sketch, parameters, blocks=config.blocks, fingerprint=model_fingerprint
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
            if config.precision:
                signal = describe_signal(state, len(chosen[dataset.name]), first=FIRST_LOOK)
                progress.note(f"{dataset.name}: {signal}")


def choose_examples(dataset: Dataset, config: SketchConfig) -> list[int]:
    """Chooses up to ``config.examples`` rows, at random by the seed and the dataset's name."""
    if dataset.num_examples < 2:
        raise InputError(
            f"{dataset.name}: split needs at least 2 examples per dataset, "
            f"got {dataset.num_examples}"
        )
    digest = hashlib.blake2b(f"{config.seed}\n{dataset.name}".encode(), digest_size=8).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    return [int(i) for i in generator.permutation(dataset.num_examples)[: config.examples]]


def _fingerprint(
    dataset: Dataset, indices: list[int], model_fingerprint: str, config: SketchConfig
) -> str:
    """Fingerprint of everything that a dataset's file of sums depends on."""
    rows = hashlib.sha256()
    for index in indices:
        for array in (dataset.examples[index].input_ids, dataset.examples[index].labels):
            rows.update(len(array).to_bytes(8, "little") + array.astype("<i4").tobytes())
    return fingerprint(
        [HASH_VERSION, model_fingerprint, to_plain(config), dataset.name, rows.hexdigest()]
    )


def _reuse(earlier: Path, directory: Path, fingerprints: Mapping[str, str]) -> set[str]:
    """Links or copies an earlier output's files of equal fingerprint; returns their datasets."""
    try:
        known = json.loads((earlier / _FINGERPRINTS).read_text())
    except (OSError, ValueError):
        return set()  # no earlier output, or one of a version without fingerprints
    taken = set()
    for name, digest in fingerprints.items():
        source = earlier / f"{name}.safetensors"
        temporary = directory / f"{name}.safetensors.tmp"
        if known.get(name) != digest or not source.is_file():
            continue
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)
        replace_file(temporary, directory / source.name)
        taken.add(name)
    return taken


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
        for start in range(state.num_examples, stop, config.batch_size):
            rows = indices[start : min(start + config.batch_size, stop)]
            _sketch_batch(model, sketcher, dataset, rows, pad_token_id)
            task.advance(len(rows), dataset.name)
    task.skip(len(indices) - state.num_examples)  # examples that were not needed
    return sketcher.state.pop(dataset.name)


def _sketch_batch(
    model: torch.nn.Module,
    sketcher: GradientSketcher,
    dataset: Dataset,
    rows: list[int],
    pad_token_id: int,
) -> None:
    examples = [dataset.examples[row] for row in rows]
    losses = target_losses(model, collate(examples, [0] * len(examples), pad_token_id))
    zeros = losses.loss.new_zeros(len(examples))
    per_example = zeros.index_add(0, losses.example, losses.loss)
    counts = zeros.index_add(0, losses.example, torch.ones_like(losses.loss))
    (per_example / counts).sum().backward()  # type: ignore[no-untyped-call]
    sums = zeros.double().index_add(0, losses.example, losses.loss.detach().double())
    sketcher.update([dataset.name] * len(examples), sums, counts.long())
