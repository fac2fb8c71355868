"""Scores of one model item by item: rows, windows of text, and answers of the base."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from merit_fast.errors import InputError, one_line
from merit_fast.manifests.atomic import write_bytes

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ItemScores:
    """Sums over each item's target tokens, and the numbers of those tokens; all float64."""

    row_loss: Array  # [N] nats
    row_exact: Array  # [N] 1 where every target is the greedy choice, else 0
    row_tokens: Array  # [N]
    text_loss: Array  # [W] nats of the windows of the general text
    text_tokens: Array  # [W]
    chat_loss: Array  # [P] nats of the base's answers
    chat_tokens: Array  # [P]


@dataclass(frozen=True, eq=False)
class Measured:
    """One measure of one model: ``values`` and ``sizes`` of its items, in strata.

    The measure is the mean over the strata of sum(values) / sum(sizes).
    """

    values: Array
    sizes: Array
    strata: tuple[int, ...]  # number of items of each stratum, in order

    @property
    def mean(self) -> float:
        return float(np.mean([v.sum() / s.sum() for v, s in self.split()]))

    def split(self) -> list[tuple[Array, Array]]:
        """Values and sizes of each stratum."""
        borders = np.cumsum(self.strata)[:-1]
        pairs = zip(np.split(self.values, borders), np.split(self.sizes, borders), strict=True)
        return list(pairs)


def measured(scores: ItemScores, measure: str, rows_of_datasets: tuple[int, ...]) -> Measured:
    """The items of ``loss``, ``exact_match``, ``text_loss`` or ``chat_nll``."""
    if measure == "loss":
        return Measured(scores.row_loss, scores.row_tokens, rows_of_datasets)
    if measure == "exact_match":
        return Measured(scores.row_exact, np.ones_like(scores.row_exact), rows_of_datasets)
    if measure == "text_loss":
        return Measured(scores.text_loss, scores.text_tokens, (len(scores.text_loss),))
    return Measured(scores.chat_loss, scores.chat_tokens, (len(scores.chat_loss),))


def write_items(scores: ItemScores, path: Path) -> None:
    """Writes the arrays as one safetensors file: the same scores give the same bytes."""
    write_bytes(path, save({field.name: getattr(scores, field.name) for field in fields(scores)}))


def read_items(path: Path) -> ItemScores:
    """Reads what ``write_items`` wrote.

    Raises:
        InputError: the file is absent, damaged or holds other arrays.
    """
    try:
        return ItemScores(**load(path.read_bytes()))
    except (OSError, SafetensorError, TypeError) as error:
        raise InputError(
            f"{path}: is not a file of item scores ({one_line(error)}); "
            "remove it, the same command measures the model again"
        ) from None
