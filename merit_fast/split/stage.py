"""The split stage: the sketch stage's files in, split.json out."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from merit_fast.data import Dataset
from merit_fast.errors import InputError
from merit_fast.manifests.schemas import (
    GroupCount,
    PartConflict,
    SharedRows,
    SplitDataset,
    SplitManifest,
    TriedNumber,
)
from merit_fast.manifests.sketch_state import SketchState, state_path
from merit_fast.progress import Progress, SilentProgress
from merit_fast.split.auto import Tried
from merit_fast.split.config import SplitConfig
from merit_fast.split.conflict import Conflict, Labels, conflict_of
from merit_fast.split.decide import Decision, decide_split
from merit_fast.split.moments import BlockProducts, block_products
from merit_fast.split.search.methods import METHODS
from merit_fast.split.separation import conflicting_pairs, pair_means
from merit_fast.split.splitter import Mixture
from merit_fast.split.text_cluster import dataset_similarity

_BEYOND = 0.1
_MANY = 50  # datasets; a split of fewer takes a few seconds


def split_mixture(  # noqa: PLR0913
    sketches: Path,
    datasets: Sequence[Dataset],
    mixture_fingerprint: str,
    config: SplitConfig,
    *,
    base_fingerprint: str,
    steps: int,
    sketched_at: str,
    texts: Callable[[], Mapping[str, Sequence[str]]],
    num_controls: int = 1,
    progress: Progress | None = None,
) -> SplitManifest:
    """Groups the datasets by the sketch stage's files.

    Args:
        sketches: directory of the sketch stage.
        datasets: the datasets to split, with their rows.
        mixture_fingerprint: fingerprint of the training rows.
        config: options.
        base_fingerprint: fingerprint of the base model. After a warm-up the gradients were taken at
            another model; the states name it, and split.json has it as ``start_fingerprint``.
        steps: optimizer steps of a joint run on these datasets.
        sketched_at: where the gradients were taken, in words.
        texts: returns every dataset's rows as text; called by methods that need texts only.
        num_controls: random splits to draw as controls; fewer are drawn where fewer exist.
        progress: display for splits of many datasets; None: nothing is shown.

    Raises:
        InputError: a sketch file is missing, broken or does not match the others or the config's
            weight; so many groups are impossible.
    """
    if config.groups != "auto" and config.groups > len(datasets):
        raise InputError(
            f"split.groups: must be at most the number of datasets ({len(datasets)}), "
            f"got {config.groups}"
        )
    states = _read_states(sketches, datasets)
    weight = states[0].identity.weight
    if config.weight not in (None, weight):
        raise InputError(
            f"split.weight: must be that of the sketches ({weight}), got {config.weight}"
        )
    shared = _shared_rows(states)
    mixture = _mixture(datasets, states, config, steps, texts)
    shown = progress if progress and len(datasets) >= _MANY else SilentProgress()
    decision = decide_split(
        _products(states, shared > 0, shown), mixture, config, num_controls, shown
    )
    choices = config.filled()
    return SplitManifest(
        groups=decision.num_groups,
        datasets=tuple(_dataset(d, states[i], decision, i) for i, d in enumerate(datasets)),
        method=choices.method,
        balance=choices.balance,
        reason=decision.reason,
        note=decision.partition.note,
        sketched_at=sketched_at,
        **_pairs(decision.conflict, decision.partition.labels),
        gram=tuple(map(tuple, decision.conflict.gram.tolist())),
        explained_variance=tuple(float(v) for v in decision.explained_variance),
        scores=tuple(tuple(map(float, row)) for row in decision.scores),
        score_errors=tuple(tuple(map(float, row)) for row in decision.score_errors),
        cuts=decision.partition.cuts,
        separations=_group_counts(decision),
        numbers_tried=tuple(map(_tried_number, decision.tried)),
        controls=decision.controls,
        num_splits=decision.num_splits,
        base_fingerprint=base_fingerprint,
        start_fingerprint=states[0].identity.model,
        mixture_fingerprint=mixture_fingerprint,
        unbalanced=decision.unbalanced,
        unbalanced_eta_squared=_share(decision.unbalanced_eta),
        noise_scale=_known(decision.noise.mixture) if decision.noise else None,
        noise_scale_error=_known(decision.noise.mixture_error) if decision.noise else None,
        weight=weight,
        shared_rows=tuple(
            SharedRows(datasets[i].name, datasets[j].name, int(shared[i, j]))
            for i, j in np.argwhere(np.triu(shared, 1))
        ),
        parts=_parts(sketches, datasets, states, shared > 0, decision, config),
    )


def _shared_rows(states: Sequence[SketchState]) -> npt.NDArray[np.int64]:
    """[N, N] numbers of different sketched rows that two datasets share; 0 on the diagonal."""
    owners: dict[int, list[int]] = {}
    for i, state in enumerate(states):
        for row in state.shared_rows.tolist():
            owners.setdefault(row, []).append(i)
    shared = np.zeros((len(states), len(states)), np.int64)
    for found in owners.values():
        shared[np.ix_(found, found)] += 1
    np.fill_diagonal(shared, 0)
    return shared


def _read_states(sketches: Path, datasets: Sequence[Dataset], part: str = "") -> list[SketchState]:
    states = [SketchState.read(state_path(sketches, d.name, part)) for d in datasets]
    for state in states[1:]:
        states[0].require_same(state)
    return states


def _parts(
    sketches: Path,
    datasets: Sequence[Dataset],
    whole: Sequence[SketchState],
    shared: npt.NDArray[np.bool_],
    decision: Decision,
    config: SplitConfig,
) -> dict[str, PartConflict]:
    """Conflicts in every part of the model, under the groups of the whole."""
    found = {}
    of_whole = decision.conflict
    square = np.where(np.isnan(of_whole.norm), np.nan, np.diag(of_whole.gram))
    for part in config.parts or {}:
        states = _read_states(sketches, datasets, part)
        for dataset, state, counted in zip(datasets, states, whole, strict=True):
            if not torch.equal(state.block_weights, counted.block_weights):
                file = state_path(sketches, dataset.name, part)
                raise InputError(f"{file}: must count the examples of {dataset.name}.safetensors")
        products = _products(states, shared, SilentProgress())
        conflict = conflict_of(products, debias=config.filled().debias)
        shares = np.diag(conflict.gram) / np.where(square > 0, square, np.nan)
        found[part] = PartConflict(
            **_pairs(conflict, decision.partition.labels),
            norm_shares=tuple(map(_known, shares.tolist())),
        )
    return found


def _pairs(conflict: Conflict, labels: Labels) -> dict[str, Any]:
    """Fields of split.json on the pairs of datasets."""
    within, across = pair_means(conflict.cosine, labels)
    conflicts = conflicting_pairs(conflict.surely_negative, labels)
    return {
        "similarity": _json_matrix(conflict.cosine),
        "similarity_errors": _json_matrix(conflict.error),
        "negative_pair_fraction": conflict.negative_pair_fraction,
        "certain_negative_fraction": conflict.certain_negative_fraction,
        "within_cosine": _known(within),
        "across_cosine": _known(across),
        "sure_conflicts": sum(conflicts),
        "sure_conflicts_across": conflicts[1],
    }


def _products(
    states: Sequence[SketchState], shared: npt.NDArray[np.bool_], progress: Progress
) -> BlockProducts:
    width = states[0].identity.sketch.proj_dim
    with progress.task("inner products", width, "columns") as task:
        return block_products(
            [state.block_sums.numpy() for state in states],
            torch.stack([s.block_counts for s in states]).numpy(),
            torch.stack([s.block_weights for s in states]).numpy(),
            shared,
            task.advance,
        )


def _mixture(
    datasets: Sequence[Dataset],
    states: Sequence[SketchState],
    config: SplitConfig,
    steps: int,
    texts: Callable[[], Mapping[str, Sequence[str]]],
) -> Mixture:
    names = [dataset.name for dataset in datasets]
    text_similarity = None
    if METHODS[config.filled().method].needs_texts:
        ordered, matrix = dataset_similarity(texts())
        order = [ordered.index(name) for name in names]
        text_similarity = matrix[np.ix_(order, order)]
    tokens = np.array([d.num_target_tokens for d in datasets], np.float64)
    samples = np.array([d.num_examples for d in datasets], np.float64)
    square_norms = torch.stack([state.block_square_norms for state in states]).numpy()
    square_weights = torch.stack([state.block_square_weights for state in states]).numpy()
    return Mixture(names, tokens, samples, steps, text_similarity, square_norms, square_weights)


def _dataset(dataset: Dataset, state: SketchState, decision: Decision, i: int) -> SplitDataset:
    conflict = decision.conflict
    noise = decision.noise
    return SplitDataset(
        name=dataset.name,
        group=decision.partition.labels[i],
        num_examples=dataset.num_examples,
        num_target_tokens=dataset.num_target_tokens,
        num_sketched_examples=state.num_examples,
        mean_loss=state.loss_sum / state.num_target_tokens,
        gradient_norm=_known(float(conflict.norm[i])),
        signal_fraction=float(conflict.signal_fraction[i]),
        signal_error=_known(float(conflict.signal_error[i])),
        more_examples=int(conflict.more_examples[i]),
        margin=decision.partition.margins[i],
        stability=float(decision.stability[i]),
        noise_scale=_known(float(noise.datasets[i])) if noise else None,
        noise_scale_error=_known(float(noise.errors[i])) if noise else None,
        suggested_share=_known(float(decision.shares[i])),
        suggested_share_error=_known(float(decision.share_errors[i])),
        median_length=state.length_quantile(0.5),
        long_length=state.length_quantile(0.95),
        weighting_cosine=state.weighting_cosine,
    )


def _group_counts(decision: Decision) -> tuple[GroupCount, ...]:
    separation = decision.separation
    if separation is None:
        return ()
    measured = not math.isnan(separation.cross_validated)
    count = GroupCount(
        decision.num_groups,
        _share(separation.eta_squared),
        _share(separation.cross_validated),
        _share(separation.null_mean),
        _known(separation.null_std),
        null_splits=len(separation.null),
        null_beaten=separation.beaten if measured else None,
        num_splits=separation.num_splits,
    )
    return (count,)


def _tried_number(row: Tried) -> TriedNumber:
    further = row.parting
    return TriedNumber(
        groups=row.num_groups,
        kept_cosine=_known(row.whole.kept),
        parted_cosine=_known(row.whole.parted),
        parted_error=_known(row.whole.parted_error),
        coarser=row.coarser,
        further_cosine=_known(further.parted),
        difference=_known(further.kept - further.parted),
        difference_error=_known(further.difference_error),
        taken=row.taken,
    )


def _json_matrix(matrix: np.ndarray) -> tuple[tuple[float | None, ...], ...]:
    if not np.isnan(matrix).any():
        return tuple(map(tuple, matrix.tolist()))
    return tuple(tuple(map(_known, row)) for row in matrix.tolist())


def _known(value: float) -> float | None:
    """The value, or None for NaN, which JSON lacks."""
    return None if math.isnan(value) else value


def _share(value: float) -> float | None:
    """A share of one whole, moved into [0, 1] where its error took it a little beyond.

    None where it is unknown or so far beyond that it is noise.
    """
    return min(max(value, 0.0), 1.0) if -_BEYOND <= value <= 1 + _BEYOND else None
