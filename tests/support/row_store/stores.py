"""Small stores of rows that are not gradients of a model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.sketch_state import SketchIdentity
from merit_fast.row_store.identity import StoreIdentity
from merit_fast.row_store.writer import RowWriter

DIM = 4096


def identity(dim: int = DIM, store_dim: int = DIM, model: str = "model") -> StoreIdentity:
    return StoreIdentity.of(SketchIdentity(CountSketch(dim), model, ("weight",)), store_dim)


def write_store(
    folder: Path,
    rows: Mapping[str, Tensor],
    of: StoreIdentity | None = None,
    *,
    tokens: Mapping[str, Tensor] | None = None,
    numbers: Mapping[str, list[int]] | None = None,
    batch: int = 5,
    shard_rows: int = 7,
) -> Path:
    """Writes sketches [n, D] of each dataset; several shards, and batches that do not fit them.

    Row i has the number i and i % 5 + 1 target tokens unless these are given.
    """
    of = of or identity()
    for name, sketches in rows.items():
        size = 2 * of.store_dim * shard_rows
        writer = RowWriter(folder / "sketch" / "rows" / name, of, "fingerprint", size)
        every = torch.arange(len(sketches))
        counts = every % 5 + 1 if tokens is None else tokens[name]
        row = every.tolist() if numbers is None else numbers[name]
        places = [row[:i].count(number) for i, number in enumerate(row)]
        for part in torch.split(every, batch):
            chosen = part.tolist()
            writer.append(
                sketches[part],
                [row[i] for i in chosen],
                [places[i] for i in chosen],
                part.double() / 4,
                counts[part],
            )
        writer.finish()
    return folder
