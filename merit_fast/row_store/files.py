"""Reads the rows of a finished store; shards are mapped into memory, not loaded."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from merit_fast.errors import InputError, one_line
from merit_fast.row_store.identity import StoreIdentity
from merit_fast.row_store.reuse import read_index
from merit_fast.row_store.writer import ROWS_FOLDER

_COLUMNS = ("scale", "norm", "square_norm", "row", "place", "loss_sum", "num_target_tokens")


@dataclass(frozen=True, eq=False)
class Vectors:
    """The stored vectors of one dataset: float16 rows in shards, and a factor for each.

    Attributes:
        shards: tensors [n_s, D'] float16, mapped from their files: read only.
        scale: [n] float32; vector i is ``scale[i] * row[i]``.
    """

    shards: tuple[Tensor, ...]
    scale: Tensor

    def __len__(self) -> int:
        return len(self.scale)

    @property
    def starts(self) -> NDArray[np.int64]:
        """[shards + 1] number of each shard's first row, and the number of rows."""
        return np.cumsum([0, *map(len, self.shards)])

    def take(self, indices: NDArray[np.int64]) -> Tensor:
        """The vectors [k, D'] float32 of the rows with these numbers."""
        return self.directions(indices) * self.scale[torch.as_tensor(indices)].unsqueeze(1)

    def directions(self, indices: NDArray[np.int64]) -> Tensor:
        """The vectors [k, D'] float32 without their factors: entries of root mean square 1."""
        shard_of = np.searchsorted(self.starts, indices, side="right") - 1
        out = torch.empty(len(indices), self.shards[0].shape[1])
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            inner = torch.as_tensor(indices[places] - self.starts[shard])
            out[torch.as_tensor(places)] = self.shards[shard][inner].float()
        return out


@dataclass(frozen=True, eq=False)
class StoredDataset:
    """The rows of one dataset, in the order in which they were sketched.

    Attributes:
        name: the dataset's name.
        vectors: the folded sketches of the gradients of the rows' mean losses.
        norm: [n] float64 norms of these vectors as they are stored.
        square_norm: [n] float64 square of the norm of each row's whole sketch.
        row: [n] int64 number of the row in its file, from 0.
        place: [n] int64 number of the example among those of its row, from 0.
        loss_sum: [n] float64 summed loss of the row's target tokens, nats.
        num_target_tokens: [n] int64 number of those tokens.
    """

    name: str
    identity: StoreIdentity
    vectors: Vectors
    norm: Tensor
    square_norm: Tensor
    row: Tensor
    place: Tensor
    loss_sum: Tensor
    num_target_tokens: Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    @cached_property
    def num_rows(self) -> int:
        """Number of the dataset's stored rows; a row may have several examples."""
        return len(torch.unique(self.row))

    @cached_property
    def indices_of_row(self) -> dict[int, list[int]]:
        """Number of a row in its file -> its examples' positions."""
        found: dict[int, list[int]] = {}
        for index, row in enumerate(self.row.tolist()):
            found.setdefault(row, []).append(index)
        return found


def read_store(directory: Path) -> dict[str, StoredDataset]:
    """Opens the store of a run, or of its sketch stage; only indices and numbers are read.

    Raises:
        InputError: there is no store, or a file of it is absent, cut or of another version.
    """
    places = [folder / ROWS_FOLDER for folder in (directory / "sketch", directory)]
    rows = next((place for place in places if place.is_dir()), None)
    if rows is None:
        raise InputError(
            f"{directory}: must be a run or its sketch with stored rows, found no "
            f"{ROWS_FOLDER} folder; run first: merit-fast sketch CONFIG.yml --store"
        )
    store = {folder.name: _read_dataset(folder) for folder in sorted(rows.iterdir())}
    if not store:
        raise InputError(f"{rows}: must hold the rows of a dataset, found none")
    first = next(iter(store.values()))
    for dataset in store.values():
        first.identity.require_same(dataset.identity, f"{rows / dataset.name}")
    return store


def _read_dataset(folder: Path) -> StoredDataset:
    index = read_index(folder)
    if index is None:
        raise InputError(f"{folder}: must hold complete rows, found no index.json of this version")
    identity = StoreIdentity(index["sketch"], index["store_dim"])
    identity.require_version(str(folder))
    shards = []
    columns: dict[str, list[Tensor]] = {name: [] for name in _COLUMNS}
    for name, (count, _) in index["shards"].items():
        try:
            with safe_open(folder / name, framework="pt") as file:
                rows = file.get_tensor("rows")
                for column, parts in columns.items():
                    parts.append(file.get_tensor(column).clone())
        except Exception as error:
            raise InputError(f"{folder / name}: is not a shard ({one_line(error)})") from None
        if rows.shape != (count, identity.store_dim) or rows.dtype != torch.float16:
            wanted = f"float16 {[count, identity.store_dim]}"
            found = f"{rows.dtype} {list(rows.shape)}"
            raise InputError(f"{folder / name}: rows: must be {wanted}, found {found}")
        shards.append(rows)
    if not shards:
        raise InputError(f"{folder}: must hold at least one row, found none")
    whole = {name: torch.cat(parts) for name, parts in columns.items()}
    return StoredDataset(
        folder.name,
        identity,
        Vectors(tuple(shards), whole["scale"]),
        whole["norm"],
        whole["square_norm"],
        whole["row"],
        whole["place"],
        whole["loss_sum"],
        whole["num_target_tokens"],
    )
