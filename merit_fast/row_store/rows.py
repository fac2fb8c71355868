"""``open_rows``: stored rows, searched by a target, and checked for outliers and duplicates."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merit_fast.errors import InputError, show
from merit_fast.row_store.checkpoints import Checkpoints, Measure
from merit_fast.row_store.files import StoredDataset, Vectors, read_store
from merit_fast.row_store.hits import Hit
from merit_fast.row_store.outliers import find_outliers
from merit_fast.row_store.pairs import Pair, find_pairs
from merit_fast.row_store.target import (
    Store,
    Weight,
    identity_of,
    require_choice,
    require_dataset,
    target_of,
    target_of_stores,
)

_Path = str | os.PathLike[str]


def open_rows(directory: _Path | Sequence[_Path], weights: Sequence[float] | None = None) -> "Rows":
    """Opens the rows that ``merit-fast sketch --store`` kept; they stay in their files.

        rows = merit_fast.open_rows("runs/mine")
        rows.search("math", k=100)                      # hits with .dataset .row .score .error

    Args:
        directory: a run's folder or its sketch folder; or several, the same rows at several
            checkpoints of one model.
        weights: factor of each checkpoint in every score, such as its learning rate (TracIn,
            Pruthi et al. 2020; LESS, Xia et al. 2024). None: the checkpoints' mean.

    Raises:
        InputError: there is no store, or it is damaged; or the checkpoints differ in hash, width,
            parameters, datasets or rows.
    """
    directories = [directory] if isinstance(directory, str | os.PathLike) else list(directory)
    if not directories:
        raise InputError("open_rows: directory: must be at least one, found none")
    factors = [1 / len(directories)] * len(directories) if weights is None else list(weights)
    if len(factors) != len(directories) or not np.isfinite(factors).all():
        raise InputError(
            f"open_rows: weights: must be {len(directories)} finite numbers, found {show(weights)}"
        )
    stores = [read_store(Path(folder).expanduser()) for folder in directories]
    for folder, store in zip(directories, stores, strict=True):
        _require_same_rows(stores[0], store, f"{folder}")
    return Rows(stores, factors)


class Rows:
    """Stored rows of one checkpoint, or the same rows of several.

    A row's vector is the folded sketch of the gradient of its mean loss. Scores of several
    checkpoints are sums over checkpoints of weight times score.
    """

    def __init__(self, stores: Sequence[Store], weights: Sequence[float]) -> None:
        self._stores = stores
        self._checkpoints = Checkpoints(stores, weights)

    @property
    def datasets(self) -> list[str]:
        """Names of the datasets with stored rows."""
        return list(self._stores[0])

    def __len__(self) -> int:
        return sum(map(len, self._stores[0].values()))

    @property
    def width(self) -> int:
        """Width D' of the stored vectors."""
        return identity_of(self._stores[0]).store_dim

    def dataset(self, name: str, checkpoint: int = 0) -> StoredDataset:
        """The rows of a dataset: numbers, places, losses, target tokens, norms and vectors.

        Raises:
            InputError: no dataset has this name.
        """
        return self._stores[checkpoint][require_dataset(self._stores[0], name, "dataset")]

    def vectors(self, dataset: str, checkpoint: int = 0) -> Vectors:
        """The vectors of a dataset: float16 [n, D'] mapped from their files, and factors [n].

        Raises:
            InputError: no dataset has this name.
        """
        return self.dataset(dataset, checkpoint).vectors

    def search(
        self,
        target: Any,
        k: int = 100,
        by: Measure = "cosine",
        weight: Weight = "tokens",
        leave_own_out: bool = True,
    ) -> list[Hit]:
        """Finds the rows whose gradients agree most with the target's mean gradient.

            t = (weights * vectors[target]).sum(0) / weights.sum()
            dot = <vector, t>; cosine = dot / (|vector| |t|)

        Args:
            target: a dataset's name; a list of (dataset, row); a vector [D'] or [D] ([C, D'] of C
                checkpoints); a ``SketchState`` of the same model (a list of C); or other ``Rows``.
            k: number of hits; all rows, if there are fewer.
            by: "cosine" or "dot".
            weight: what a row counts in the target's mean, its target tokens ("tokens") or 1
                ("examples"). A state keeps the weights it has.
            leave_own_out: the target's own rows are no hits; False: they are, with themselves in
                the mean.

        Returns:
            Hits by falling score; equal scores in the order of the store. Errors are jackknife
            errors over 8 blocks of the target's rows (a state's own blocks), None for a vector or
            one row. They leave out the sketch's own: about sqrt(1 / D + 1 / D') of a cosine. A row
            whose gradient is 0 has cosine 0.

        Raises:
            InputError: the target is unknown, has no direction, is not finite or has another width.
        """
        require_choice("search: by", by, ("cosine", "dot"))
        require_choice("search: weight", weight, ("tokens", "examples"))
        _require_count("search: k", k)
        if isinstance(target, Rows):
            found = target_of_stores(target._stores, self._stores, weight)
        else:
            found = target_of(target, self._stores, weight)
        means = [found.means(checkpoint) for checkpoint in range(len(self._stores))]
        firsts = [mean[:1] for mean in means]
        others = [mean[1:] for mean in means]
        every = self._checkpoints
        scores = {name: every.scores(name, firsts, by)[:, 0] for name in self.datasets}
        chosen = every.best(scores, k, found.own if leave_own_out else frozenset())
        return every.hits(
            scores, chosen, lambda name, indices: every.scores(name, others, by, indices)
        )

    def outliers(self, dataset: str, k: int = 100, weight: Weight = "tokens") -> list[Hit]:
        """Finds the rows that agree least with the rest of their own dataset, such as wrong labels.

            t_i = sum of weights * vectors over the other rows; score = cosine(vector_i, t_i)

        Args:
            dataset: a dataset's name.
            k: number of hits; all rows, if there are fewer.
            weight: as for ``search``.

        Returns:
            Hits by rising score, with jackknife errors over 8 blocks of the other rows.

        Raises:
            InputError: no dataset has this name, or it has one row.
        """
        require_choice("outliers: weight", weight, ("tokens", "examples"))
        _require_count("outliers: k", k)
        if len(self.dataset(dataset)) < 2:
            raise InputError(f"outliers: {dataset}: must have at least 2 rows, found 1")
        return find_outliers(self._checkpoints, dataset, k, weight)

    def duplicates(self, above: float = 0.999, most: int = 1_000_000) -> list[Pair]:
        """Finds pairs of rows, within and across datasets, whose cosine is at least ``above``.

        All pairs are screened by a projection of 512 numbers, and those near ``above`` or over it
        are computed at full width. A pair is missed with a probability below one in a million.

        Args:
            above: the least cosine, above 0 and at most 1.
            most: the largest number of pairs.

        Returns:
            Pairs by falling cosine. Rows whose gradient is 0 are in no pair.

        Raises:
            InputError: ``above`` breaks its rule, there are more than ``most`` pairs, or several
                checkpoints are open.
        """
        if len(self._stores) > 1:
            raise InputError(
                f"duplicates: must have one checkpoint open, found {len(self._stores)}"
            )
        if not 0 < above <= 1:
            raise InputError(f"duplicates: above: must be above 0 and at most 1, found {above}")
        return find_pairs(list(self._stores[0].values()), above, most)


def _require_count(key: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{key}: must be a whole number of at least 1, found {show(value)}")


def _require_same_rows(first: Store, store: Store, where: str) -> None:
    """Checks that two checkpoints hold the same rows of the same datasets in the same order."""
    identity_of(first).require_same(identity_of(store), where, model_may_differ=True)
    if list(first) != list(store):
        expected = ", ".join(first)
        raise InputError(f"{where}: datasets: must be {expected}, found {', '.join(store)}")
    for name, dataset in first.items():
        for key in ("row", "place", "num_target_tokens"):
            if not torch.equal(getattr(dataset, key), getattr(store[name], key)):
                raise InputError(
                    f"{where}: {name}: {key}: must be those of the first checkpoint, found others"
                )
