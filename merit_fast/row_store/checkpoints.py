"""Scores of stored rows with targets, summed over checkpoints, and the hits among them."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merit_fast.block_estimates import jackknife_error
from merit_fast.kernels.search import row_products
from merit_fast.row_store.hits import Hit
from merit_fast.row_store.target import Store

Measure = Literal["cosine", "dot"]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Checkpoints:
    """Rows stored at one or several checkpoints, and the factor of each checkpoint in a score."""

    stores: Sequence[Store]
    weights: Sequence[float]

    def scores(
        self,
        name: str,
        targets: Sequence[Tensor],
        by: Measure,
        indices: Indices | None = None,
    ) -> Tensor:
        """Scores [n, m] float64 of a dataset's rows with m targets of each checkpoint.

        Args:
            name: the dataset.
            targets: for each checkpoint [m, D'] float32.
            by: cosine or inner product.
            indices: positions of the rows; None: all of them.
        """
        parts = [
            factor * _scores(store, name, vectors, by, indices)
            for store, factor, vectors in zip(self.stores, self.weights, targets, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def best(
        self, scores: Mapping[str, Tensor], k: int, own: Set[tuple[str, int]]
    ) -> list[tuple[str, int]]:
        """The k largest scores, as dataset and position, without the rows in ``own``."""
        parts = []
        for name, tensor in scores.items():
            rows = {row for dataset, row in own if dataset == name}
            values = tensor.numpy()
            if rows:
                is_own = np.isin(self.stores[0][name].row.numpy(), list(rows))
                values = np.where(is_own, -np.inf, values)
            parts.append(values)
        whole = np.concatenate(parts)
        order = np.argsort(-whole, kind="stable")[:k]
        order = order[whole[order] > -np.inf]
        starts = np.cumsum([0, *map(len, parts)])
        part_of = np.searchsorted(starts, order, side="right") - 1
        names = list(scores)
        pairs = zip(part_of.tolist(), order.tolist(), strict=True)
        return [(names[part], int(place - starts[part])) for part, place in pairs]

    def hits(
        self,
        scores: Mapping[str, Tensor],
        chosen: Sequence[tuple[str, int]],
        left_out: Callable[[str, Indices], Tensor],
    ) -> list[Hit]:
        """The chosen rows with their errors.

        Args:
            scores: dataset -> scores [n] of all its rows.
            chosen: dataset and position of each hit.
            left_out: returns the scores [k, G] of k rows of a dataset with each of the target's
                G blocks left out.
        """
        hits: dict[int, Hit] = {}
        for name in dict.fromkeys(name for name, _ in chosen):
            places = [i for i, (other, _) in enumerate(chosen) if other == name]
            indices = np.array([chosen[i][1] for i in places])
            others = left_out(name, indices).numpy()
            has_errors = others.shape[1] > 1
            errors = jackknife_error(others.T) if has_errors else None
            dataset = self.stores[0][name]
            for number, index in enumerate(indices.tolist()):
                hits[places[number]] = Hit(
                    name,
                    int(dataset.row[index]),
                    float(scores[name][index]),
                    None if errors is None else float(errors[number]),
                    int(dataset.place[index]),
                    tuple(others[number].tolist()) if has_errors else (),
                )
        return [hits[i] for i in range(len(chosen))]


def ratio(products: Tensor, lengths: Tensor) -> Tensor:
    """products / lengths, between -1 and 1, and 0 where a length is 0."""
    safe = torch.where(lengths > 0, lengths, 1.0)
    return torch.where(lengths > 0, products / safe, 0.0).clamp(-1, 1)


def _scores(
    store: Store, name: str, targets: Tensor, by: Measure, indices: Indices | None
) -> Tensor:
    dataset = store[name]
    if indices is None:
        products = torch.cat([row_products(shard, targets) for shard in dataset.vectors.shards])
        scale = dataset.vectors.scale
        norm = dataset.norm
    else:
        products = row_products(dataset.vectors.directions(indices), targets)
        scale = dataset.vectors.scale[torch.as_tensor(indices)]
        norm = dataset.norm[torch.as_tensor(indices)]
    exact = products.double() * scale.double().unsqueeze(1)
    if by == "dot":
        return exact
    return ratio(exact, norm.unsqueeze(1) * targets.double().norm(dim=1))
