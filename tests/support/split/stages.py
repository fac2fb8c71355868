"""The split stage on block sums that a test has drawn."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from merit_fast.data import Dataset, Example
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.schemas import SplitManifest
from merit_fast.manifests.sketch_state import SketchIdentity, SketchState, state_path
from merit_fast.progress import Progress
from merit_fast.split import SplitConfig, split_mixture

WIDTH = 4096
_EXAMPLE = Example(np.array([1, 2], np.int32), np.array([-100, 2], np.int32))


def split_sums(
    sums: NDArray[np.float64],
    counts: NDArray[np.int64],
    config: SplitConfig,
    *,
    rows: Sequence[int] | None = None,
    num_controls: int = 1,
    steps: int = 4000,
    progress: Progress | None = None,
    parts: Mapping[str, NDArray[np.float64]] | None = None,
) -> SplitManifest:
    """split.json of datasets d00, d01, ... with these block sums [N, G, D], D up to 4096.

    ``rows``: rows of each dataset, one target token each; by default all have 1000. ``parts``:
    block sums of parts of the model.
    """
    names = [f"d{i:02}" for i in range(len(sums))]
    rows = rows or [1000] * len(names)
    datasets = [Dataset(name, (_EXAMPLE,) * n) for name, n in zip(names, rows, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        for part, sums_of_part in {"": sums, **(parts or {})}.items():
            identity = SketchIdentity(CountSketch(WIDTH, 0), "model", (part or "a",))
            for name, blocks, count in zip(names, sums_of_part, counts, strict=True):
                state = SketchState.zeros(identity, len(blocks))
                state.block_sums[:, : blocks.shape[1]] = torch.from_numpy(blocks)
                state.block_counts += torch.from_numpy(count)
                state.block_weights += torch.from_numpy(count)
                state.loss_sum = state.num_target_tokens = int(count.sum())
                file = state_path(Path(folder), name, part)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(state.to_bytes())
        return split_mixture(
            Path(folder),
            datasets,
            "mixture",
            config,
            base_fingerprint="base",
            steps=steps,
            sketched_at="at the base model",
            texts=dict,
            num_controls=num_controls,
            progress=progress,
        )
