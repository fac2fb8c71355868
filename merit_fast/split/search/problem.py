"""Pins, and the partition problem that they leave. Pure NumPy."""

import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from merit_fast.errors import InputError, show
from merit_fast.options.fields import option
from merit_fast.records import field, record

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]

FREE = -1


@record
class Pins:
    """Datasets that stay together, apart or in one group.

    Groups are numbered from 0, as in split.json.
    """

    together: tuple[tuple[str, ...], ...] = option([], "lists of datasets that stay in one group")
    apart: tuple[tuple[str, ...], ...] = option(
        [], "lists of datasets that all go to different groups"
    )
    group: dict[str, int] = field(
        default_factory=dict, metadata={"help": "dataset: the number of its group, from 0"}
    )


@record
class Problem:
    """M items to be put into K groups.

    An item is one dataset, several that stay together, or a share of one.

    Attributes:
        num_groups: K.
        share: [N, M] share of a dataset in an item; rows sum to 1.
        weights: [M] weights of the items, sum 1.
        products: [M, M] weight_i weight_j <z_i, z_j>, symmetric.
        fixed: [M] group of an item, -1 where free.
        apart: [M, M] True where two items may not share a group.
    """

    num_groups: int
    share: Array
    weights: Array
    products: Array
    fixed: Labels
    apart: npt.NDArray[np.bool_]

    @functools.cached_property
    def keeps_apart(self) -> bool:
        """Whether any two items may not share a group."""
        return bool(self.apart.any())


def pose_problem(
    similarity: Array,
    weights: Array,
    names: Sequence[str],
    num_groups: int,
    pins: Pins,
    spread: Iterable[str],
) -> Problem:
    """Poses the problem of ``names``, which must be sorted.

    The first item is the one with the first name.

    Raises:
        InputError: unknown names, pins that contradict each other, or more groups than can be
            filled.
    """
    number = len(names)
    spread = sorted(set(spread))
    index = {name: i for i, name in enumerate(names)}
    for key, name in _named(pins, spread):
        if name not in index:
            raise InputError(f"{key}: must be a dataset of the mixture, got {show(name)}")
        if key != "spread" and name in spread:
            raise InputError(f"{key}: {name} cannot be pinned, its rows are spread over all groups")
    owner = _join(index, pins.together)
    whole = sorted({owner[i] for i in range(number) if names[i] not in spread})
    column = {first: i for i, first in enumerate(whole)}
    items = len(whole) + num_groups * len(spread)
    share = np.zeros((number, items))
    fixed = np.full(items, FREE)
    for i, name in enumerate(names):
        if name in spread:  # one item in every group
            start = len(whole) + num_groups * spread.index(name)
            share[i, start : start + num_groups] = 1 / num_groups
            fixed[start : start + num_groups] = np.arange(num_groups)
        else:
            share[i, column[owner[i]]] = 1.0
    item_of = {name: column[owner[i]] for name, i in index.items() if owner[i] in column}
    _fix(pins.group, item_of, fixed, num_groups)
    apart = _keep_apart(pins.apart, names, item_of, fixed, num_groups)
    fillable = len(set(fixed.tolist()) - {FREE}) + int((fixed == FREE).sum())
    if fillable < num_groups:
        joined = " of datasets that may part" if pins.together or pins.group else ""
        raise InputError(
            f"groups: must be at most the number of datasets ({fillable}{joined}), got {num_groups}"
        )
    products = share.T @ (np.outer(weights, weights) * similarity) @ share
    return Problem(num_groups, share, share.T @ weights, products, fixed, apart)


def _named(pins: Pins, spread: Iterable[str]) -> Iterable[tuple[str, str]]:
    for key, lists in (("pins.together", pins.together), ("pins.apart", pins.apart)):
        yield from ((key, name) for names in lists for name in names)
    yield from (("pins.group", name) for name in pins.group)
    yield from (("spread", name) for name in spread)


def _join(index: Mapping[str, int], together: Iterable[Sequence[str]]) -> list[int]:
    """[N] the first dataset that each dataset is joined with."""
    owner = list(range(len(index)))
    for names in together:
        joined = {owner[index[name]] for name in names}
        owner = [min(joined) if first in joined else first for first in owner]
    return owner


def _fix(
    pinned: Mapping[str, int], item_of: Mapping[str, int], fixed: Labels, num_groups: int
) -> None:
    """Enters the groups of pinned datasets into ``fixed``."""
    for name in sorted(pinned):
        group = pinned[name]
        item = item_of[name]
        if not 0 <= group < num_groups:
            raise InputError(f"pins.group.{name}: must be 0 to {num_groups - 1}, got {group}")
        if fixed[item] not in (FREE, group):
            first = next(other for other in sorted(pinned) if item_of[other] == item)
            raise InputError(
                f"pins: {first} and {name} must be together, "
                f"but are pinned to groups {pinned[first]} and {group}"
            )
        fixed[item] = group


def _keep_apart(
    lists: Iterable[Sequence[str]],
    names: Sequence[str],
    item_of: Mapping[str, int],
    fixed: Labels,
    num_groups: int,
) -> npt.NDArray[np.bool_]:
    """[M, M] pairs of items that may not share a group."""
    apart = np.zeros((len(fixed), len(fixed)), bool)
    for listed in lists:
        parted = sorted(set(listed))
        for i, name in enumerate(parted):
            for other in parted[:i]:
                _check_pair(other, name, item_of, fixed)
                apart[item_of[name], item_of[other]] = True
                apart[item_of[other], item_of[name]] = True
        if len(parted) > num_groups:
            raise InputError(
                f"pins.apart: {', '.join(parted)} must be apart, "
                f"which takes {len(parted)} groups, not {num_groups}"
            )
    if apart.any() and color_apart(apart, fixed, num_groups) is None:
        touched = [name for name in names if any(name in listed for listed in lists)]
        raise InputError(f"pins: no way to keep {', '.join(touched)} apart in {num_groups} groups")
    return apart


def _check_pair(first: str, second: str, item_of: Mapping[str, int], fixed: Labels) -> None:
    pair = f"{first} and {second}"
    item = item_of[second]
    if item_of[first] == item:
        raise InputError(f"pins: {pair} must be together and apart")
    if fixed[item] != FREE and fixed[item] == fixed[item_of[first]]:
        raise InputError(f"pins: {pair} must be apart, but both are pinned to group {fixed[item]}")


def color_apart(apart: npt.NDArray[np.bool_], fixed: Labels, num_groups: int) -> Labels | None:
    """Labels of the items that must keep apart, -1 for the rest; None if there are no such labels.

    Backtracks; the item with the fewest groups left comes next (Brelaz 1979). Groups without a pin
    or an item are alike, so it tries only the first of them.
    """
    labels = fixed.copy()
    touched = np.flatnonzero(apart.any(1))

    def left(item: int) -> list[int]:
        taken = set(labels[apart[item]].tolist())
        used = set(labels.tolist()) - {FREE}
        fresh = next((k for k in range(num_groups) if k not in used), None)
        return [k for k in range(num_groups) if k not in taken and (k in used or k == fresh)]

    def assign_rest() -> bool:
        open_items = [int(i) for i in touched if labels[i] == FREE]
        if not open_items:
            return True
        choices = {item: left(item) for item in open_items}
        item = min(open_items, key=lambda i: (len(choices[i]), i))
        for group in choices[item]:
            labels[item] = group
            if assign_rest():
                return True
            labels[item] = FREE
        return False

    if not assign_rest():
        return None
    return np.where(apart.any(1), labels, FREE)
