"""What a user demands of a split, and the partition problem it leaves: datasets joined, cut and fixed. Pure NumPy."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merit_fast.errors import InputError, show
from merit_fast.options.fields import option

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]

FREE = -1


@dataclass(frozen=True)
class Pins:
    """Datasets whose place is not for the search to choose. Groups are numbered from 0, as in split.json."""

    together: tuple[tuple[str, ...], ...] = option([], "lists of datasets that stay in one group")
    apart: tuple[tuple[str, ...], ...] = option(
        [], "lists of datasets of which no two share a group"
    )
    group: dict[str, int] = dataclasses.field(
        default_factory=dict, metadata={"help": "dataset: the number of its group, from 0"}
    )


@dataclass(frozen=True)
class Problem:
    """M items to be put into K groups. An item is a dataset, several that stay together, or the part of one.

    Attributes:
        groups: K.
        share: [N, M] which part of a dataset is in an item; rows sum to 1.
        weights: [M] weight of the items, sum 1.
        products: [M, M] weight_i weight_j <z_i, z_j>, symmetric.
        fixed: [M] group an item must be in, -1 where free.
        apart: [M, M] True where two items may not share a group.
    """

    groups: int
    share: Array
    weights: Array
    products: Array
    fixed: Labels
    apart: npt.NDArray[np.bool_]


def pose_problem(
    similarity: Array,
    weights: Array,
    names: Sequence[str],
    groups: int,
    pins: Pins,
    spread: Iterable[str],
) -> Problem:
    """The problem of ``names``, which must be sorted: the first item is the one with the first name.

    Raises:
        InputError: unknown names, pins that contradict each other, or more groups than can be filled.
    """
    number, spread = len(names), sorted(set(spread))
    place = {name: i for i, name in enumerate(names)}
    for key, found in _named(pins, spread):
        if found not in place:
            raise InputError(f"{key}: must be a dataset of the mixture, got {show(found)}")
        if key != "spread" and found in spread:
            raise InputError(
                f"{key}: {found} cannot be pinned, its rows are spread over all groups"
            )
    owner = _join(place, pins.together)
    whole = sorted({owner[i] for i in range(number) if names[i] not in spread})
    column = {first: i for i, first in enumerate(whole)}
    items = len(whole) + groups * len(spread)
    share, fixed = np.zeros((number, items)), np.full(items, FREE)
    for i, name in enumerate(names):
        if name in spread:  # one part in every group
            start = len(whole) + groups * spread.index(name)
            share[i, start : start + groups] = 1 / groups
            fixed[start : start + groups] = np.arange(groups)
        else:
            share[i, column[owner[i]]] = 1.0
    _fix(pins.group, names, place, owner, column, fixed, groups)
    apart = _part(pins.apart, names, place, owner, column, fixed, groups)
    fillable = len(set(fixed.tolist()) - {FREE}) + int((fixed == FREE).sum())
    if fillable < groups:
        joined = " of datasets that may part" if pins.together or pins.group else ""
        raise InputError(
            f"groups: must be at most the number of datasets ({fillable}{joined}), got {groups}"
        )
    products = share.T @ (np.outer(weights, weights) * similarity) @ share
    return Problem(groups, share, share.T @ weights, products, fixed, apart)


def _named(pins: Pins, spread: Iterable[str]) -> Iterable[tuple[str, str]]:
    for key, lists in (("pins.together", pins.together), ("pins.apart", pins.apart)):
        yield from ((key, name) for names in lists for name in names)
    yield from (("pins.group", name) for name in pins.group)
    yield from (("spread", name) for name in spread)


def _join(place: Mapping[str, int], together: Iterable[Sequence[str]]) -> list[int]:
    """For every dataset the first one it is joined with."""
    owner = list(range(len(place)))
    for names in together:
        joined = {owner[place[name]] for name in names}
        owner = [min(joined) if first in joined else first for first in owner]
    return owner


def _fix(
    pinned: Mapping[str, int],
    names: Sequence[str],
    place: Mapping[str, int],
    owner: list[int],
    column: Mapping[int, int],
    fixed: Labels,
    groups: int,
) -> None:
    for name in sorted(pinned):
        group, item = pinned[name], column[owner[place[name]]]
        if not 0 <= group < groups:
            raise InputError(f"pins.group.{name}: must be 0 to {groups - 1}, got {group}")
        if fixed[item] not in (FREE, group):
            first = next(n for n in sorted(pinned) if owner[place[n]] == owner[place[name]])
            raise InputError(
                f"pins: {first} and {name} must be together, but are pinned to groups {pinned[first]} and {group}"
            )
        fixed[item] = group


def _part(
    lists: Iterable[Sequence[str]],
    names: Sequence[str],
    place: Mapping[str, int],
    owner: list[int],
    column: Mapping[int, int],
    fixed: Labels,
    groups: int,
) -> npt.NDArray[np.bool_]:
    apart = np.zeros((len(fixed), len(fixed)), bool)
    for listed in lists:
        parted = sorted(set(listed))
        items = [column[owner[place[name]]] for name in parted]
        for i, item in enumerate(items):
            for j in range(i):
                pair = f"{parted[j]} and {parted[i]}"
                if items[j] == item:
                    raise InputError(f"pins: {pair} must be together and apart")
                if fixed[item] != FREE and fixed[item] == fixed[items[j]]:
                    raise InputError(
                        f"pins: {pair} must be apart, but both are pinned to group {fixed[item]}"
                    )
                apart[item, items[j]] = apart[items[j], item] = True
        if len(items) > groups:
            raise InputError(
                f"pins.apart: {', '.join(parted)} must be apart, which takes {len(items)} groups, not {groups}"
            )
    if apart.any() and color_apart(apart, fixed, groups) is None:
        touched = [name for name in names if any(name in listed for listed in lists)]
        raise InputError(f"pins: no way to keep {', '.join(touched)} apart in {groups} groups")
    return apart


def color_apart(apart: npt.NDArray[np.bool_], fixed: Labels, groups: int) -> Labels | None:
    """Groups for the items with somebody to keep apart from, -1 for the others; None if there is no way.

    Backtracking; next is always the item with the fewest groups left (Brelaz 1979). Groups without a pin or an item
    are alike, so only the first of them is tried.
    """
    labels = fixed.copy()
    touched = np.flatnonzero(apart.any(1))

    def left(item: int) -> list[int]:
        taken = set(labels[apart[item]].tolist())
        used = set(labels.tolist()) - {FREE}
        fresh = next((k for k in range(groups) if k not in used), None)
        return [k for k in range(groups) if k not in taken and (k in used or k == fresh)]

    def place() -> bool:
        open_items = [int(i) for i in touched if labels[i] == FREE]
        if not open_items:
            return True
        choices = {item: left(item) for item in open_items}
        item = min(open_items, key=lambda i: (len(choices[i]), i))
        for group in choices[item]:
            labels[item] = group
            if place():
                return True
            labels[item] = FREE
        return False

    if not place():
        return None
    return np.where(apart.any(1), labels, FREE)
