"""The sketch stage: a model and datasets in, one file of sums per dataset out.

A dataset's sums depend on nothing but the model, the options, its name and the rows chosen. A fingerprint of these in
datasets.json tells which files of an earlier output are still what sketching would give: new datasets cost themselves.
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
from merit_fast.sketch.sampling import check_blocks, describe, next_examples
from merit_fast.sketch.selection import select_parameters

FIRST_LOOK, ERROR_RATE = 32, 0.05  # of adaptive sampling
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
    """Sketches per-example gradients of every dataset at the model, one ``NAME.safetensors`` of sums each.

    The loss of an example is the mean over its target tokens. A file that is there already is taken as done, so a
    killed run goes on with the next dataset.

    Args:
        earlier: a finished output, of whatever mixture and options: what it holds that this one would make anew is
            taken over, with the bytes that sketching would give.

    Raises:
        InputError: a dataset of one example; parameters that select nothing; blocks too few for ``precision``.
    """
    chosen = {d.name: choose_examples(d, config) for d in datasets}
    if config.precision:
        check_blocks(config.blocks, FIRST_LOOK, max(map(len, chosen.values())), ERROR_RATE)
    marks = {d.name: _fingerprint(d, chosen[d.name], model_fingerprint, config) for d in datasets}
    missing = [d for d in datasets if not (directory / f"{d.name}.safetensors").exists()]
    if earlier is not None and (
        reused := _take_over(earlier, directory, {d.name: marks[d.name] for d in missing})
    ):
        progress.note(
            f"sketch: {len(reused)} of {len(datasets)} datasets are as before, their sketches are reused"
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
    write_text(directory / _FINGERPRINTS, json.dumps(marks, indent=1, sort_keys=True) + "\n")


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
                progress.note(
                    f"{dataset.name}: {describe(state, len(chosen[dataset.name]), first=FIRST_LOOK)}"
                )


def choose_examples(dataset: Dataset, config: SketchConfig) -> list[int]:
    """Up to ``config.examples`` indices, by a random order that depends on seed and dataset name alone."""
    if dataset.num_examples < 2:
        raise InputError(
            f"{dataset.name}: split needs at least 2 examples per dataset, got {dataset.num_examples}"
        )
    digest = hashlib.blake2b(f"{config.seed}\n{dataset.name}".encode(), digest_size=8).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    return [int(i) for i in generator.permutation(dataset.num_examples)[: config.examples]]


def _fingerprint(
    dataset: Dataset, indices: list[int], model_fingerprint: str, config: SketchConfig
) -> str:
    """Of all that a dataset's file of sums depends on."""
    rows = hashlib.sha256()
    for index in indices:
        for array in (dataset.examples[index].input_ids, dataset.examples[index].labels):
            rows.update(len(array).to_bytes(8, "little") + array.astype("<i4").tobytes())
    return fingerprint(
        [HASH_VERSION, model_fingerprint, to_plain(config), dataset.name, rows.hexdigest()]
    )


def _take_over(earlier: Path, directory: Path, marks: Mapping[str, str]) -> set[str]:
    """Links or copies the files of an earlier output that have these fingerprints; returns their names."""
    try:
        known = json.loads((earlier / _FINGERPRINTS).read_text())
    except (OSError, ValueError):
        return set()  # there is none, or it is of a version that kept no fingerprints
    taken = set()
    for name, mark in marks.items():
        source, temporary = earlier / f"{name}.safetensors", directory / f"{name}.safetensors.tmp"
        if known.get(name) != mark or not source.is_file():
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
    """All of ``indices`` in their order, or, with ``config.precision``, as many as it takes."""
    state = sketcher.state[dataset.name] = SketchState.zeros(sketcher.identity, config.blocks)
    while more := next_examples(
        state, len(indices), config.precision, first=FIRST_LOOK, error_rate=ERROR_RATE
    ):
        stop = state.num_examples + more
        for start in range(state.num_examples, stop, config.batch_size):
            rows = indices[start : min(start + config.batch_size, stop)]
            _sketch_batch(model, sketcher, dataset, rows, pad_token_id)
            task.advance(len(rows), dataset.name)
    task.advance(len(indices) - state.num_examples, dataset.name)  # those that were not needed
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
