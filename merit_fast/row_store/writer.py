"""Writes the rows of one dataset: shards of bounded size, then the file that completes them."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor

from merit_fast.errors import MeritFastError
from merit_fast.manifests.atomic import write_bytes, write_text
from merit_fast.manifests.hashes import checksum
from merit_fast.row_store.identity import StoreIdentity

ROWS_FOLDER = "rows"  # of the sketch stage's output
INDEX_FILE = "index.json"
FORMAT_VERSION = 1
_SHARD_BYTES = 64 << 20
_SMALLEST = float(torch.finfo(torch.float32).tiny)


@dataclass
class RowWriter:
    """Writes one dataset's rows as they are sketched; holds one shard in memory.

    A row is stored as float16 [D'] and a float32 factor, the row's root mean square: no size of
    gradients overflows or vanishes. ``finish`` makes the dataset complete.

    Attributes:
        folder: the dataset's folder; what an unfinished writer left there is removed.
        identity: of the store.
        fingerprint: digest of everything that the rows depend on.
        shard_bytes: size at which a shard is written.
    """

    folder: Path
    identity: StoreIdentity
    fingerprint: str
    shard_bytes: int = _SHARD_BYTES
    _waiting: list[dict[str, Tensor]] = field(default_factory=list)
    _shards: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._rows_per_shard = max(1, self.shard_bytes // (2 * self.identity.store_dim))

    def append(
        self,
        sketches: Tensor,
        rows: Sequence[int] | NDArray[np.int64],
        places: Sequence[int] | NDArray[np.int64],
        loss_sums: Tensor,
        num_target_tokens: Tensor,
    ) -> None:
        """Adds B examples.

        Args:
            sketches: [B, D] float32, of the gradient of each example's mean loss.
            rows: [B] number of each example's row in its file, from 0.
            places: [B] number of the example among those of its row, from 0.
            loss_sums: [B] summed loss of its target tokens, nats.
            num_target_tokens: [B] number of those tokens.

        Raises:
            MeritFastError: a folded sketch is not finite.
        """
        exact = sketches.detach().cpu()
        stored, scale, norms = to_stored(self.identity.fold(exact))
        if not torch.isfinite(norms).all():
            raise MeritFastError(f"{self.folder}: a row must be finite, found NaN or infinity")
        self._add(
            {
                "rows": stored,
                "scale": scale,
                "norm": norms,
                "square_norm": exact.double().square().sum(1),
                "row": torch.as_tensor(np.asarray(rows, np.int64)),
                "place": torch.as_tensor(np.asarray(places, np.int64)),
                "loss_sum": loss_sums.detach().cpu().double(),
                "num_target_tokens": num_target_tokens.detach().cpu().long(),
            }
        )

    def append_folder(self, folder: Path) -> None:
        """Adds the rows that another writer of this identity has finished in ``folder``."""
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        for name in sorted(index["shards"]):
            self._add(load_file(folder / name))

    def _add(self, rows: dict[str, Tensor]) -> None:
        self._waiting.append(rows)
        while sum(len(part["row"]) for part in self._waiting) >= self._rows_per_shard:
            self._write_shard(self._rows_per_shard)

    def finish(self) -> None:
        """Writes the last shard and the index: the dataset's rows are complete then."""
        if self._waiting:
            self._write_shard(self._rows_per_shard)
        index = {
            "version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "store_dim": self.identity.store_dim,
            "sketch": dict(self.identity.sketch),
            "shards": self._shards,
        }
        write_text(self.folder / INDEX_FILE, json.dumps(index, indent=1, sort_keys=True) + "\n")

    def _write_shard(self, count: int) -> None:
        """Writes the first ``count`` waiting rows; the others wait on."""
        names = self._waiting[0]
        whole = {name: torch.cat([part[name] for part in self._waiting]) for name in names}
        first = {name: tensor[:count].contiguous() for name, tensor in whole.items()}
        rest = {name: tensor[count:].clone() for name, tensor in whole.items()}
        self._waiting = [rest] if len(rest["row"]) else []
        file = self.folder / f"{len(self._shards):05d}.safetensors"
        write_bytes(file, save(first))
        self._shards[file.name] = [len(first["row"]), checksum(file)]


def to_stored(folded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rows [B, D'] as float16, their factors [B] float32, and norms [B] float64.

        scale = sqrt(mean(row ** 2)); stored = (row / scale).half(); norm = |scale * stored|

    An entry of ``stored`` is at most sqrt(D'), which float16 holds. A row of zeros has norm 0.
    """
    exact = folded.double()
    scale = exact.square().mean(1).sqrt().clamp(min=_SMALLEST).float()
    stored = (exact / scale.double().unsqueeze(1)).half()
    norms = stored.double().square().sum(1).sqrt() * scale.double()
    return stored, scale, norms
