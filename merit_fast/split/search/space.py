"""The admissible splits of a mixture next to a given one: counted and listed, or drawn.

A split is admissible if it obeys the pins, fills every group and is as balanced as the tolerance
asks; where the given split does not keep the tolerance, as balanced as that split. Splits are
compared as partitions: the groups' numbers do not count. Pure NumPy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merit_fast.split.search.problem import FREE, Array, Labels, Pins, Problem, pose_problem
from merit_fast.split.search.starts import random_deal
from merit_fast.split.search.swap import balance, fits, imbalance, obey

_MOST_STATES = 1_500_000  # of all levels of the enumeration, which then takes about a second
_ROUNDING = 1e-12
_DEALS = 8


@dataclass(frozen=True)
class OtherSplits:
    """Admissible splits other than a given one.

    Attributes:
        labels: [R, N] distinct splits in random order, -1 for spread datasets; a larger R adds
            rows at the end.
        number: how many exist; None: too many to count.
    """

    labels: Labels
    number: int | None


@dataclass(frozen=True)
class _Atoms:
    """Sets of datasets that no admissible split parts, heaviest first.

    Attributes:
        owner: [N] atom of every dataset, -1 where its rows are spread.
        weights: [A].
        apart: [A, A] True where two atoms may not share a group.
        common: weight that every group has of the spread datasets.
    """

    owner: Labels
    weights: Array
    apart: npt.NDArray[np.bool_]
    common: float


def other_splits(  # noqa: PLR0913
    given: Sequence[int] | None,
    weights: Array,
    names: Sequence[str],
    num_groups: int,
    count: int,
    *,
    tolerance: float | None = None,
    pins: Pins | None = None,
    spread: Sequence[str] = (),
    seed: int = 0,
) -> OtherSplits:
    """Returns up to ``count`` distinct admissible splits and how many there are.

    They are a uniform choice where all can be listed; else random deals made to balance.

    Args:
        given: [N] labels of the split to leave out. None: none is left out.
        weights: [N] positive: tokens or samples of the datasets.
        names: [N], distinct; the result does not depend on their order.
        num_groups: K.
        count: number of splits wanted.
        tolerance: as in ``partition_datasets``.
        pins: as in ``partition_datasets``.
        spread: as in ``partition_datasets``.
        seed: seed of the choice.

    Raises:
        InputError: the pins contradict each other or need other groups.
    """
    order = np.array(sorted(range(len(names)), key=lambda i: names[i]), np.intp)
    sorted_names = [names[i] for i in order]
    weights = np.asarray(weights, np.float64)[order] / np.sum(weights)
    pins = pins or Pins()
    tolerance = 0.05 / num_groups if tolerance is None else tolerance
    nothing = np.zeros((len(names), len(names)))
    problem = pose_problem(nothing, weights, sorted_names, num_groups, pins, spread)
    if num_groups == 1:
        return OtherSplits(np.empty((0, len(names)), np.intp), 0)
    generator = np.random.default_rng(seed)
    atoms = _join_pinned(problem)
    left_out = None if given is None else np.asarray(given)[order]
    if left_out is not None and ((left_out < 0) != (atoms.owner < 0)).any():
        left_out = None  # it deals whole datasets to all groups: no split of them
    limit = _limit(problem, atoms, weights, left_out, tolerance, generator)
    listed = _enumerate(atoms, num_groups, limit)
    if listed is None:
        found = _draw(problem, left_out, count, limit, generator)
        number = None
    else:
        others = listed if left_out is None else listed[_differ(listed, atoms, left_out)]
        chosen = others[generator.permutation(len(others))[:count]]
        found = np.where(atoms.owner >= 0, chosen[:, atoms.owner], FREE).astype(np.intp)
        number = len(others)
    pinned = {sorted_names.index(name): group for name, group in pins.group.items()}
    labels = np.empty((len(found), len(names)), np.intp)
    for row, split in zip(labels, found, strict=True):
        row[order] = _number_groups(split, num_groups, pinned)
    return OtherSplits(labels, number)


def _join_pinned(problem: Problem) -> _Atoms:
    """Joins the items pinned to one group, and keeps apart those pinned to different ones."""
    whole = np.flatnonzero(problem.share.max(0) == 1.0)
    joined = np.arange(len(problem.weights))
    first: dict[int, int] = {}
    for item in whole:
        if problem.fixed[item] != FREE:
            joined[item] = first.setdefault(int(problem.fixed[item]), int(item))
    weight: Array = np.zeros(len(joined))
    np.add.at(weight, joined[whole], problem.weights[whole])
    roots = sorted(set(joined[whole].tolist()), key=lambda item: (-weight[item], item))
    atom_of = np.full(len(joined), FREE)
    atom_of[whole] = [roots.index(root) for root in joined[whole]]
    apart = np.zeros((len(roots), len(roots)), bool)
    for one, other in np.argwhere(problem.apart):
        apart[atom_of[one], atom_of[other]] = True
    pinned = [atom_of[item] for item in first.values()]
    for atom in pinned:
        apart[atom, [other for other in pinned if other != atom]] = True
    common = float(np.delete(problem.weights, whole).sum()) / problem.num_groups
    return _Atoms(atom_of[problem.share.argmax(1)], weight[roots], apart, common)


def _limit(
    problem: Problem,
    atoms: _Atoms,
    weights: Array,
    given: Labels | None,
    tolerance: float,
    generator: np.random.Generator,
) -> float:
    """The imbalance allowed: the tolerance, or that of the given split if it is more.

    Without a given split the least imbalance of some balanced random deals stands in for it.
    """
    if given is not None:
        members = given[:, None] == np.arange(problem.num_groups)
        off = members.T @ weights + atoms.common - 1 / problem.num_groups
        return max(tolerance, float(np.abs(off).max()))
    deals = (obey(problem, random_deal(problem, generator)) for _ in range(_DEALS))
    balanced = [balance(problem, deal, tolerance, sign=0.0) for deal in deals]
    return max(tolerance, min(imbalance(problem, labels) for labels in balanced))


def _enumerate(atoms: _Atoms, num_groups: int, limit: float) -> Labels | None:
    """[S, A] all admissible splits as restricted growth strings; None: too many to list.

    Adds one atom at a time to every state and drops a state once a group weighs too much, or the
    atoms left cannot lift the light groups or fill the empty ones.
    """
    high = 1 / num_groups + limit + _ROUNDING - atoms.common
    low = 1 / num_groups - limit - _ROUNDING - atoms.common
    if not atoms.apart.any() and _fewest_states(atoms.weights, num_groups, low) > _MOST_STATES:
        return None
    groups = np.arange(num_groups)
    labels = np.empty((1, 0), np.int16)
    weight = np.zeros((1, num_groups))
    used = np.zeros(1, np.intp)
    left = float(atoms.weights.sum())
    states = 0
    for atom, own in enumerate(atoms.weights):
        allowed = (groups <= used[:, None]) & (weight + own <= high)
        for other in np.flatnonzero(atoms.apart[atom, :atom]):
            allowed[np.arange(len(labels)), labels[:, other]] = False
        states += int(np.count_nonzero(allowed))
        if states > _MOST_STATES:
            return None
        state, group = np.nonzero(allowed)
        weight = weight[state]
        weight[np.arange(len(state)), group] += own
        used = np.maximum(used[state], group + 1)
        left -= own
        kept = np.maximum(low - weight, 0.0).sum(1) <= left + _ROUNDING
        if not atoms.common:  # a group of spread datasets only is not empty
            kept &= num_groups - used <= len(atoms.weights) - atom - 1
        labels = np.concatenate((labels[state], group[:, None].astype(np.int16)), axis=1)[kept]
        weight = weight[kept]
        used = used[kept]
    return labels.astype(np.intp)


def _fewest_states(weights: Array, num_groups: int, low: float) -> int:
    """Returns states that no weight rules out: those of the heaviest atoms that fit one group."""
    free = int((np.cumsum(weights) <= low).sum())
    ways = [1] + [0] * num_groups  # by the number of groups in use
    states = 0
    for _ in range(min(free, len(weights) - num_groups)):
        ways = [0, *(ways[k - 1] + k * ways[k] for k in range(1, num_groups + 1))]
        states += sum(ways)
        if states > _MOST_STATES:
            break
    return states


def _differ(listed: Labels, atoms: _Atoms, given: Labels) -> npt.NDArray[np.bool_]:
    """[S] whether a listed split is another partition than the given one."""
    first = [int(np.flatnonzero(atoms.owner == atom)[0]) for atom in range(len(atoms.weights))]
    own = _number_groups(given[first], len(first), {})
    return np.asarray((listed != own).any(1))


def _draw(
    problem: Problem,
    given: Labels | None,
    count: int,
    limit: float,
    generator: np.random.Generator,
) -> Labels:
    """[R, N] up to ``count`` distinct splits from random deals."""
    number = problem.num_groups
    seen = set() if given is None else {_number_groups(given, number, {}).tobytes()}
    whole = problem.share.max(1) == 1.0
    item = problem.share.argmax(1)
    found: list[Labels] = []
    for _ in range(4 * count + 64):
        if len(found) == count:
            break
        dealt = balance(problem, obey(problem, random_deal(problem, generator)), limit, sign=0.0)
        labels = _number_groups(np.where(whole, dealt[item], FREE), number, {})
        if fits(problem, dealt, limit) and labels.tobytes() not in seen:
            seen.add(labels.tobytes())
            found.append(labels)
    return np.array(found, np.intp).reshape(len(found), len(whole))


def _number_groups(labels: Labels, num_groups: int, pinned: Mapping[int, int]) -> Labels:
    """Numbers the groups in the order of their first datasets; pinned ones keep their number.

    Args:
        labels: [N]; -1 stays.
        num_groups: K.
        pinned: position of a dataset -> number of its group.
    """
    rename = {int(labels[position]): group for position, group in pinned.items()}
    free = iter(sorted(set(range(num_groups)) - set(rename.values())))
    for label in labels.tolist():
        if label != FREE and label not in rename:
            rename[label] = next(free)
    rename[FREE] = FREE
    return np.array([rename[label] for label in labels.tolist()], np.intp)
