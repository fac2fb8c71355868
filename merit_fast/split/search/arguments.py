"""Checks of what a caller asks of a split."""

from collections.abc import Sequence

import numpy as np

from merit_fast.errors import InputError, show
from merit_fast.split.search.methods import METHODS, SplitMethod
from merit_fast.split.search.problem import Array, Labels, Pins


def check_arguments(
    weights: Array, names: Sequence[str], num_groups: int, method: str, tolerance: float
) -> SplitMethod:
    """Returns the method's entry.

    Raises:
        InputError: an argument breaks its rule.
    """
    if method not in METHODS:
        raise InputError(f"method: must be one of {', '.join(METHODS)}, got {show(method)}")
    if num_groups < 1:
        raise InputError(f"groups: must be at least 1, got {num_groups}")
    if METHODS[method].power_of_two and num_groups & (num_groups - 1):
        raise InputError(f"groups: must be a power of two with method {method}, got {num_groups}")
    if not names or len(set(names)) != len(names):
        twice = next((name for name in names if list(names).count(name) > 1), None)
        raise InputError(
            f"names: must be distinct and at least one, got {show(twice or list(names))}"
        )
    if len(weights) != len(names) or not (np.isfinite(weights).all() and (weights > 0).all()):
        pairs = zip(names, weights, strict=False)
        bad = [name for name, weight in pairs if not 0 < weight < np.inf]
        raise InputError(
            "weights: must be one positive number per dataset, "
            f"got {show(weights.tolist())} ({bad})"
        )
    if not tolerance >= 0:
        raise InputError(f"tolerance: must be 0 or more, got {tolerance}")
    return METHODS[method]


def sorted_matrix(matrix: Array, order: Labels, key: str) -> Array:
    """The matrix with rows and columns in ``order``.

    Raises:
        InputError: it is not finite or not [N, N].
    """
    matrix = np.asarray(matrix, np.float64)
    number = len(order)
    if matrix.shape != (number, number) or not np.isfinite(matrix).all():
        raise InputError(
            f"{key}: must be finite and [{number}, {number}], got {list(matrix.shape)}"
        )
    return np.asarray(matrix[np.ix_(order, order)])


def manual_pins(
    manual: Sequence[Sequence[str]] | None, names: Sequence[str], num_groups: int, pins: Pins
) -> Pins:
    """``pins`` with every dataset pinned to the group that ``manual`` lists it in.

    Raises:
        InputError: the lists are no K groups of all datasets, or contradict the pins.
    """
    if manual is None or len(manual) != num_groups:
        raise InputError(
            f"manual: must list the datasets of {num_groups} groups, got {show(manual)}"
        )
    label_of: dict[str, int] = {}
    for label, listed in enumerate(manual):
        for name in listed:
            if label_of.setdefault(name, label) != label:
                raise InputError(
                    f"manual: {name} must be in one group, got {label_of[name]} and {label}"
                )
    missing = sorted(set(names) - set(label_of))
    if missing:
        raise InputError(f"manual: must name every dataset, got none of {show(missing)}")
    empty = [label for label, listed in enumerate(manual) if not listed]
    if empty:
        raise InputError(f"manual: no group may be empty, got group {empty[0]}")
    for name, label in pins.group.items():
        if label_of.get(name, label) != label:
            raise InputError(f"manual: {name} is pinned to group {label}, got {label_of[name]}")
    return Pins(together=pins.together, apart=pins.apart, group=label_of)
