"""The sketch and split stages: datasets in, sketch states and split.json out."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from merit_fast.data import Dataset, collate
from merit_fast.errors import InputError
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifest import SplitDataset, SplitManifest
from merit_fast.model import load_model, target_losses
from merit_fast.progress import Progress
from merit_fast.split.config import SketchConfig, SplitConfig
from merit_fast.split.conflict import Conflict, double_center, eta_squared, measure_conflict
from merit_fast.split.gradients import GradientSketcher
from merit_fast.split.partition import Partition, conflict_axes, median_partition, random_partition
from merit_fast.split.statistics import SketchIdentity, SketchState

_NULL_SPLITS = 200


def sketch_mixture(
    model_path: str,
    model_fingerprint: str,
    datasets: Sequence[Dataset],
    pad_token_id: int,
    config: SketchConfig,
    directory: Path,
    progress: Progress,
) -> None:
    """Sketches per-example gradients of every dataset at the model, one ``NAME.safetensors`` of sums each.

    The loss of an example is the mean over its target tokens. A file that is there already is taken as done, so a
    killed run goes on with the next dataset.
    """
    chosen = {d.name: choose_examples(d, config) for d in datasets}
    missing = [d for d in datasets if not (directory / f"{d.name}.safetensors").exists()]
    if not missing:
        return
    model = load_model(model_path, config.dtype)
    with (
        GradientSketcher(model, CountSketch(config.proj_dim, config.seed)) as sketcher,
        progress.task("sketch gradients", sum(len(chosen[d.name]) for d in missing), "examples") as task,
    ):
        identity = SketchIdentity(sketcher.sketch, model_fingerprint, tuple(sketcher.parameter_names))
        for dataset in missing:
            state = SketchState.zeros(identity, config.blocks)
            indices = chosen[dataset.name]
            for start in range(0, len(indices), config.batch_size):
                rows = range(start, min(start + config.batch_size, len(indices)))
                _sketch_batch(model, sketcher, state, dataset, indices, rows, pad_token_id)
                task.advance(len(rows), dataset.name)
            _write_bytes(directory / f"{dataset.name}.safetensors", state.to_bytes())


def choose_examples(dataset: Dataset, config: SketchConfig) -> list[int]:
    """Up to ``config.examples`` indices, by a random order that depends on seed and dataset name alone."""
    if dataset.num_examples < 2:
        raise InputError(f"{dataset.name}: split needs at least 2 examples per dataset, got {dataset.num_examples}")
    digest = hashlib.blake2b(f"{config.seed}\n{dataset.name}".encode(), digest_size=8).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    return [int(i) for i in generator.permutation(dataset.num_examples)[: config.examples]]


def split_mixture(
    sketches: Path, datasets: Sequence[Dataset], mixture_fingerprint: str, config: SplitConfig
) -> SplitManifest:
    """Groups the datasets by the published recipe, from the sketch stage's files alone.

    Raises:
        InputError: fewer datasets than groups, a sketch file that is missing, broken or does not match the others.
    """
    if len(datasets) < config.groups:
        raise InputError(f"split.groups: must be at most the number of datasets ({len(datasets)}), got {config.groups}")
    states = [SketchState.read(sketches / f"{d.name}.safetensors") for d in datasets]
    for state in states[1:]:
        SketchState.zeros(states[0].identity, config.blocks).merge(state)
    conflict = measure_conflict(
        torch.stack([s.block_sums for s in states]).numpy(), torch.stack([s.block_counts for s in states]).numpy()
    )
    names = [d.name for d in datasets]
    balance = np.array([d.num_examples if config.balance == "samples" else d.num_target_tokens for d in datasets])
    weights = balance / balance.sum()
    count = config.groups.bit_length() - 1
    axes = conflict_axes(conflict.cosine, count)
    partition = median_partition(axes.scores, weights, names)
    generator = np.random.default_rng(config.seed)
    control = random_partition(weights, names, count, generator)
    eta, null = _separation(conflict, weights, partition, names, count, generator)
    return SplitManifest(
        groups=config.groups,
        datasets=tuple(
            _row(d, s, partition.groups[i], conflict, i) for i, (d, s) in enumerate(zip(datasets, states, strict=True))
        ),
        similarity=_rows(conflict.cosine),
        similarity_errors=_rows(conflict.error),
        negative_pair_fraction=conflict.negative_pair_fraction,
        explained_variance=tuple(float(v) for v in axes.explained_variance),
        scores=_rows(axes.scores),
        cuts=partition.cuts,
        eta_squared=eta,
        eta_squared_null_mean=float(null.mean()),
        eta_squared_null_std=float(null.std()),
        random_groups=control.groups,
        base_fingerprint=states[0].identity.model_fingerprint,
        mixture_fingerprint=mixture_fingerprint,
    )


def _sketch_batch(
    model: torch.nn.Module,
    sketcher: GradientSketcher,
    state: SketchState,
    dataset: Dataset,
    indices: list[int],
    rows: range,
    pad_token_id: int,
) -> None:
    examples = [dataset.examples[indices[row]] for row in rows]
    batch = collate(examples, [0] * len(examples), pad_token_id)
    losses = target_losses(model, batch)
    zeros = losses.loss.new_zeros(len(examples))
    per_example = zeros.index_add(0, losses.example, losses.loss)
    counts = zeros.index_add(0, losses.example, torch.ones_like(losses.loss))
    (per_example / counts).sum().backward()  # type: ignore[no-untyped-call]
    state.add_examples(
        sketcher.take(),
        torch.tensor([row % len(state.block_counts) for row in rows]),  # round-robin, whatever the batch size
        float(losses.loss.detach().double().sum()),
        len(losses.loss),
    )


def _separation(
    conflict: Conflict,
    weights: np.ndarray,
    partition: Partition,
    names: list[str],
    axes: int,
    generator: np.random.Generator,
) -> tuple[float, np.ndarray]:
    """eta squared of the split, and of random balanced splits."""
    centered = double_center(conflict.cosine, weights)
    null = [
        eta_squared(centered, weights, random_partition(weights, names, axes, generator).groups)
        for _ in range(_NULL_SPLITS)
    ]
    return eta_squared(centered, weights, partition.groups), np.array(null)


def _row(dataset: Dataset, state: SketchState, group: int, conflict: Conflict, i: int) -> SplitDataset:
    return SplitDataset(
        name=dataset.name,
        group=group,
        num_examples=dataset.num_examples,
        num_target_tokens=dataset.num_target_tokens,
        num_sketched_examples=state.num_examples,
        mean_loss=state.loss_sum / state.num_target_tokens,
        gradient_norm=float(conflict.norm[i]),
        signal_fraction=float(conflict.signal_fraction[i]),
    )


def _rows(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in matrix)


def _write_bytes(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
