"""The split stage: the sketch stage's files in, split.json out."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from merit_fast.data import Dataset
from merit_fast.errors import InputError
from merit_fast.manifests.schemas import GroupCount, SplitDataset, SplitManifest
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.split.config import SplitConfig
from merit_fast.split.decide import Decision, Mixture, decide
from merit_fast.split.moments import block_products
from merit_fast.split.separation import pair_means
from merit_fast.split.text_cluster import dataset_similarity


def split_mixture(
    sketches: Path,
    datasets: Sequence[Dataset],
    mixture_fingerprint: str,
    config: SplitConfig,
    *,
    base_fingerprint: str,
    steps: int,
    sketched_at: str,
    texts: Callable[[], Mapping[str, Sequence[str]]],
) -> SplitManifest:
    """Groups the datasets, from the sketch stage's files alone.

    Args:
        sketches: directory of the sketch stage.
        datasets: what is split, with its rows.
        mixture_fingerprint: of the training rows.
        config: how.
        base_fingerprint: of the base model; after a warm-up the sketches are of another one.
        steps: optimizer steps of a joint run on these datasets.
        sketched_at: where the gradients were taken, in words.
        texts: every dataset's rows as text, asked for by method text-cluster only.

    Raises:
        InputError: a sketch file that is missing, broken or does not match the others; groups that cannot be had.
    """
    if config.groups != "auto" and config.groups > len(datasets):
        raise InputError(
            f"split.groups: must be at most the number of datasets ({len(datasets)}), got {config.groups}"
        )
    states = [SketchState.read(sketches / f"{d.name}.safetensors") for d in datasets]
    for state in states[1:]:
        states[0].require_same(state)
    products = block_products(
        [state.block_sums.numpy() for state in states],
        torch.stack([s.block_counts for s in states]).numpy(),
    )
    names, similarity = [dataset.name for dataset in datasets], None
    if config.filled().method == "text-cluster":
        ordered, of_texts = dataset_similarity(texts())
        place = [ordered.index(name) for name in names]
        similarity = of_texts[np.ix_(place, place)]
    tokens = np.array([d.num_target_tokens for d in datasets], np.float64)
    samples = np.array([d.num_examples for d in datasets], np.float64)
    decision = decide(products, Mixture(names, tokens, samples, steps, similarity), config)
    fingerprints = (base_fingerprint, mixture_fingerprint)
    return _manifest(decision, datasets, states, config, sketched_at, fingerprints)


def _manifest(
    decision: Decision,
    datasets: Sequence[Dataset],
    states: Sequence[SketchState],
    config: SplitConfig,
    sketched_at: str,
    fingerprints: tuple[str, str],
) -> SplitManifest:
    conflict, found, chosen = decision.conflict, decision.partition, config.filled()
    within, across, _ = pair_means(conflict.cosine, found.groups)
    return SplitManifest(
        groups=decision.groups,
        datasets=tuple(_row(d, states[i], decision, i) for i, d in enumerate(datasets)),
        method=chosen.method,
        balance=chosen.balance,
        reason=decision.reason,
        note=found.note,
        sketched_at=sketched_at,
        similarity=_rows(conflict.cosine),
        similarity_errors=_rows(conflict.error),
        negative_pair_fraction=conflict.negative_pair_fraction,
        certain_negative_fraction=conflict.certain_negative_fraction,
        within_cosine=_known(within),
        across_cosine=_known(across),
        explained_variance=tuple(float(v) for v in decision.explained_variance),
        scores=tuple(tuple(map(float, row)) for row in decision.scores),
        score_errors=tuple(tuple(map(float, row)) for row in decision.score_errors),
        cuts=found.cuts,
        separations=tuple(
            GroupCount(k, *map(_known, (s.eta_squared, s.cross_validated, s.null_mean, s.null_std)))
            for k, s in sorted(decision.separations.items())
        ),
        random_groups=decision.random,
        base_fingerprint=fingerprints[0],
        start_fingerprint=states[0].identity.model_fingerprint,
        mixture_fingerprint=fingerprints[1],
    )


def _row(dataset: Dataset, state: SketchState, decision: Decision, i: int) -> SplitDataset:
    conflict = decision.conflict
    return SplitDataset(
        name=dataset.name,
        group=decision.partition.groups[i],
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
    )


def _rows(matrix: np.ndarray) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(_known(float(value)) for value in row) for row in matrix)


def _known(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
