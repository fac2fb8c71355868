"""Finds training rows among the held-out rows of a whole mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.mixture.scan import KEY_BYTES, PROMPT_BYTES, Keys, Scan, place_of
from merit_fast.data.sources import Source


@dataclass(frozen=True, eq=False)
class HeldOutRows:
    """The held-out rows of one dataset, as positions in the scan of their source."""

    name: str
    source: Source
    scan: Scan
    positions: NDArray[np.int64]


class HeldOut:
    """The held-out rows of a mixture."""

    def __init__(self, datasets: Sequence[HeldOutRows]) -> None:
        self._datasets = datasets
        keys = [dataset.scan.keys[dataset.positions] for dataset in datasets]
        prompts = [dataset.scan.prompts[dataset.positions] for dataset in datasets]
        self._keys = np.unique(np.concatenate([np.zeros(0, f"S{KEY_BYTES}"), *keys]))
        self._prompts = np.unique(np.concatenate([np.zeros(0, f"S{PROMPT_BYTES}"), *prompts]))

    def holds(self, keys: Keys) -> NDArray[np.bool_]:
        """[n] whether each conversation is held out."""
        return _among(keys, self._keys)

    def asks(self, prompts: Keys) -> NDArray[np.bool_]:
        """[n] whether a held-out conversation has each prompt."""
        return _among(prompts, self._prompts)

    def find(self, key: bytes) -> tuple[str, str]:
        """The name of the first dataset that holds a conversation out, and the row's place.

        Raises:
            KeyError: none does.
        """
        for dataset in self._datasets:
            matches = np.flatnonzero(dataset.scan.keys[dataset.positions] == key)
            if len(matches):
                row = dataset.scan.rows[dataset.positions[matches[0]]]
                return dataset.name, place_of(dataset.source, int(row))
        raise KeyError(key)


def _among(values: Keys, known: Keys) -> NDArray[np.bool_]:
    if not len(known):
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.asarray(known[places] == values)
