"""The target of a search: sums of gradients in blocks, at every checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merit_fast.errors import InputError, show
from merit_fast.manifests.sketch_state import SketchState
from merit_fast.row_store.files import StoredDataset
from merit_fast.row_store.identity import StoreIdentity

Weight = Literal["tokens", "examples"]
Store = Mapping[str, StoredDataset]
_CHUNK_ROWS = 1024
_BLOCKS = 8


@dataclass(frozen=True, eq=False)
class Target:
    """Weighted sums of a target's gradients.

    Attributes:
        sums: for each checkpoint [G, D'] float64, the sums of G blocks of its rows.
        weights: [G] float64, the sums of the rows' weights.
        own: the target's rows, as dataset and number of the row.
    """

    sums: tuple[Tensor, ...]
    weights: Tensor
    own: frozenset[tuple[str, int]] = frozenset()

    def means(self, checkpoint: int) -> Tensor:
        """The mean, and the means with one block left out: [1 + G, D'] float32; [1, D'] if G is 1.

        Raises:
            InputError: the mean is 0, so that it has no direction.
        """
        sums = self.sums[checkpoint]
        total = sums.sum(0, keepdim=True)
        means = total / self.weights.sum()
        if not means.any():
            raise InputError("search: target: must have a mean gradient other than 0")
        if len(sums) > 1:
            others = (self.weights.sum() - self.weights).unsqueeze(1)
            means = torch.cat([means, (total - sums) / others])
        return means.float()


def target_of(target: Any, stores: Sequence[Store], weight: Weight) -> Target:
    """Reads what a user gives as a target of ``Rows.search``.

    Raises:
        InputError: it names what is not there, or does not fit the stores.
    """
    if isinstance(target, str):
        return _of_rows(stores, [(require_dataset(stores[0], target, "target"), None)], weight)
    if isinstance(target, SketchState):
        target = [target]
    if isinstance(target, Tensor | np.ndarray):
        return _of_vectors(torch.as_tensor(target), stores)
    if not isinstance(target, Sequence) or not target:
        raise InputError(
            "search: target: must be a dataset's name, pairs of dataset and row, a vector, or a "
            f"SketchState, found {show(target)}"
        )
    if isinstance(target[0], SketchState):
        return _of_states(target, stores)
    return _of_rows(stores, _parts_of_pairs(target, stores[0]), weight)


def target_of_stores(targets: Sequence[Store], stores: Sequence[Store], weight: Weight) -> Target:
    """The mean of all rows of other stores, of the same models and sketches."""
    if len(targets) != len(stores):
        raise InputError(
            f"search: target: must have {len(stores)} checkpoints, found {len(targets)}"
        )
    for store, other in zip(stores, targets, strict=True):
        identity_of(store).require_same(identity_of(other), "search: target")
    found = _of_rows(targets, [(name, None) for name in targets[0]], weight)
    return Target(found.sums, found.weights)


def identity_of(store: Store) -> StoreIdentity:
    """The identity that all datasets of a store have."""
    return next(iter(store.values())).identity


def require_dataset(store: Store, name: Any, key: str) -> str:
    """Checks that the store has a dataset.

    Raises:
        InputError: it has not.
    """
    if name not in store:
        raise InputError(f"{key}: must be one of {', '.join(store)}, found {show(name)}")
    return str(name)


def weights_of(dataset: StoredDataset, weight: Weight) -> Tensor:
    """[n] float64 weight of each row: its target tokens, or 1."""
    if weight == "tokens":
        return dataset.num_target_tokens.double()
    return torch.ones(len(dataset), dtype=torch.float64)


def require_choice(key: str, value: str, words: Sequence[str]) -> None:
    """Checks an argument that is one of a few words.

    Raises:
        InputError: it is none of them.
    """
    if value not in words:
        raise InputError(f"{key}: must be {' or '.join(words)}, found {show(value)}")


def block_numbers(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n] block of each example: rows fill the blocks in turn, examples of a row stay together."""
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return np.asarray(rank[inverse] % _BLOCKS)


def block_sums(
    dataset: StoredDataset, indices: NDArray[np.int64], blocks: NDArray[np.int64], weight: Weight
) -> tuple[Tensor, Tensor]:
    """Sums of weighted vectors [8, D'] float64 and of weights [8] float64, over blocks of rows."""
    sums = torch.zeros(_BLOCKS, dataset.identity.store_dim, dtype=torch.float64)
    weights = weights_of(dataset, weight)[torch.as_tensor(indices)]
    block = torch.as_tensor(blocks)
    for start in range(0, len(indices), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        vectors = dataset.vectors.take(indices[part]).double()
        sums.index_add_(0, block[part], vectors * weights[part].unsqueeze(1))
    totals = torch.zeros(_BLOCKS, dtype=torch.float64).index_add_(0, block, weights)
    return sums, totals


# ---- the kinds of targets
_Part = tuple[str, NDArray[np.int64] | None]  # a dataset and positions in it; None: all of them


def _of_rows(stores: Sequence[Store], parts: Sequence[_Part], weight: Weight) -> Target:
    own = []
    chosen = []
    for name, indices in parts:
        dataset = stores[0][name]
        places = np.arange(len(dataset)) if indices is None else indices
        numbers = dataset.row.numpy()[places]
        own += [(name, int(row)) for row in numbers]
        chosen.append((name, places))
    ids = {pair: number for number, pair in enumerate(dict.fromkeys(own))}
    blocks = block_numbers(np.array([ids[pair] for pair in own]))
    ends = np.cumsum([len(places) for _, places in chosen])[:-1]
    cut = np.split(blocks, ends)
    sums = []
    for store in stores:
        found = [
            block_sums(store[name], places, block, weight)
            for (name, places), block in zip(chosen, cut, strict=True)
        ]
        sums.append(torch.stack([one for one, _ in found]).sum(0))
        weights = torch.stack([one for _, one in found]).sum(0)
    present = weights > 0
    return Target(tuple(one[present] for one in sums), weights[present], frozenset(own))


def _parts_of_pairs(pairs: Sequence[Any], store: Store) -> list[_Part]:
    positions: dict[str, list[int]] = {}
    for pair in dict.fromkeys(tuple(pair) if isinstance(pair, list) else pair for pair in pairs):
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise InputError(
                f"search: target: must be pairs of dataset and row, found {show(pair)}"
            )
        name = require_dataset(store, pair[0], "search: target: dataset")
        indices = store[name].indices_of_row.get(pair[1])
        if indices is None:
            raise InputError(
                f"search: target: row: must be a stored row of {name}, found {show(pair[1])}"
            )
        positions.setdefault(name, []).extend(indices)
    return [(name, np.array(indices)) for name, indices in positions.items()]


def _of_vectors(vectors: Tensor, stores: Sequence[Store]) -> Target:
    rows = vectors.reshape(1, -1) if vectors.dim() == 1 else vectors
    identity = identity_of(stores[0])
    widths = (identity.store_dim, identity.proj_dim)
    if rows.dim() != 2 or len(rows) != len(stores) or rows.shape[1] not in widths:
        wanted = " or ".join(f"[{len(stores)}, {width}]" for width in dict.fromkeys(widths))
        raise InputError(f"search: target: must be a vector {wanted}, found {list(vectors.shape)}")
    if not torch.isfinite(rows).all():
        raise InputError("search: target: must be finite, found NaN or infinity")
    if rows.shape[1] != identity.store_dim:
        rows = identity.fold(rows)
    sums = tuple(row.reshape(1, -1).double() for row in rows)
    return Target(sums, torch.ones(1, dtype=torch.float64))


def _of_states(states: Sequence[SketchState], stores: Sequence[Store]) -> Target:
    if len(states) != len(stores):
        raise InputError(
            f"search: target: must be {len(stores)} sketch states, found {len(states)}"
        )
    present = states[0].block_counts > 0
    sums = []
    for state, store in zip(states, stores, strict=True):
        identity = identity_of(store)
        identity.require_same(
            StoreIdentity.of(state.identity, identity.store_dim), "search: target"
        )
        sums.append(identity.fold(state.block_sums[present]).double())
    return Target(tuple(sums), states[0].block_weights[present])
