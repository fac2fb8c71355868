"""Which row each model gives to each token of the output, by number; reads no tensor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from merit_fast.records import record

Integers = npt.NDArray[np.int64]
MADE = -1  # in place of a model: the row is made


@record
class MeanRow:
    """The mean of rows (model, row); () zeros."""

    rows: tuple[tuple[int, int], ...]


@record
class PaddingRow:
    """The mean of all rows that a model has for tokens."""

    model: int


@record
class Override:
    """The row that one token gets. ``row`` None: the model's own row of the token."""

    key: str  # names the option in errors
    model: int | None  # None: zeros
    row: int | None
    force: bool


@dataclass
class RowPlan:
    """Rows of every model for the output's vocabulary of V rows.

    Attributes:
        models: [K, V] the model that gives the row; MADE: it is row ``rows`` of ``made``.
        rows: [K, V] the row in that model.
        made: rows that no model has.
        is_token: [V] whether a token has the id.
        without_row: ids of tokens that no model has, which are zeros.
        borrowed: number of tokens for which some model takes another one's row.
    """

    models: Integers
    rows: Integers
    is_token: npt.NDArray[np.bool_]
    made: list[MeanRow | PaddingRow] = field(default_factory=list)
    without_row: list[int] = field(default_factory=list)
    borrowed: int = 0
    _runs: dict[int, "list[Run]"] = field(default_factory=dict)

    def runs(self, model: int) -> "list[Run]":
        """``runs_of`` all ids, kept: several matrices share them."""
        if model not in self._runs:
            self._runs[model] = runs_of(self, model, np.arange(self.models.shape[1]))
        return self._runs[model]

    def changes(self, model: int, num_rows: int) -> bool:
        """Whether the model's matrices of ``num_rows`` rows do not stay as they are."""
        count = self.models.shape[1]
        own = bool((self.models[model] == model).all())
        if num_rows != count or not own:
            return True
        return not np.array_equal(self.rows[model], np.arange(count))

    def keeps(self, num_rows: int) -> bool:
        """Whether every model gives its own first rows to the first ids."""
        count, length = self.models.shape
        if num_rows > length:
            return False
        own = (self.models[:, :num_rows] == np.arange(count)[:, None]).all()
        return bool(own and (self.rows[:, :num_rows] == np.arange(num_rows)).all())


def plan_rows(
    sources: Integers,
    is_token: npt.NDArray[np.bool_],
    base: int | None,
    overrides: Mapping[int, Override],
) -> RowPlan:
    """Chooses the row of every model for every id.

    A model that has the token gives its own row. Where some lack it, a row stands in: the one of an
    override; of the only model that has it; of the base, if it has it; else the mean of those that
    have it; zeros where none has it. Ids without a token are padding: the mean of a model's rows.

    Args:
        sources: [K, V] each model's row of each id; -1: it has none.
        is_token: [V] ids that are no padding.
        base: the model whose row wins.
        overrides: by id.
    """
    count = sources.shape[0]
    plan = RowPlan(
        np.repeat(np.arange(count)[:, None], sources.shape[1], 1), sources.copy(), is_token
    )
    numbers: dict[MeanRow | PaddingRow, int] = {}

    def made(row: MeanRow | PaddingRow) -> tuple[int, int]:
        number = numbers.setdefault(row, len(plan.made))
        if number == len(plan.made):
            plan.made.append(row)
        return MADE, number

    lacking = (sources < 0).any(0) & is_token
    forced = [number for number, override in overrides.items() if override.force]
    for number in sorted({*np.flatnonzero(lacking).tolist(), *forced}):
        override = overrides.get(number)
        present = np.flatnonzero(sources[:, number] >= 0).tolist()
        model, row = _stand_in(sources, number, present, base, override, made)
        if not present and override is None:
            plan.without_row.append(number)
        plan.borrowed += 1
        for k in range(count):
            if sources[k, number] < 0 or (override is not None and override.force):
                plan.models[k, number] = model
                plan.rows[k, number] = row
    padding = np.flatnonzero(~is_token)
    for k in range(count if len(padding) else 0):
        plan.models[k, padding], plan.rows[k, padding] = made(PaddingRow(k))
    return plan


def _stand_in(
    sources: Integers,
    number: int,
    present: Sequence[int],
    base: int | None,
    override: Override | None,
    made: Callable[[MeanRow | PaddingRow], tuple[int, int]],
) -> tuple[int, int]:
    """(model, row) that stands in for the row of the id ``number``."""
    if override is not None:
        if override.model is None:
            return made(MeanRow(()))
        row = override.row
        return override.model, int(sources[override.model, number]) if row is None else row
    if len(present) == 1:
        return present[0], int(sources[present[0], number])
    if base is not None and base in present:
        return base, int(sources[base, number])
    return made(MeanRow(tuple((k, int(sources[k, number])) for k in present)))


@record
class Run:
    """Consecutive ids ``first`` to ``first + count - 1`` with rows of one model from ``row`` on.

    ``step``: how the row grows with the id: 1, or 0 where one row serves all.
    """

    first: int
    count: int
    model: int
    row: int
    step: int


def runs_of(plan: RowPlan, model: int, ids: Integers) -> list[Run]:
    """The rows of one model for some ids, joined; the model's own rows come first.

    ``first`` counts positions in ``ids``.
    """
    givers = plan.models[model, ids]
    rows = plan.rows[model, ids]
    if not len(ids):
        return []
    same = givers[1:] == givers[:-1]
    steps = rows[1:] - rows[:-1]
    grows = np.flatnonzero(~(same & (steps == 1)))
    stays = same & (steps == 0)
    starts = [0, *(grows + 1).tolist()]
    ends = [*starts[1:], len(ids)]
    runs: list[Run] = []
    for first, end in zip(starts, ends, strict=True):
        last = runs[-1] if runs else None
        alone = end - first == 1
        joins = (
            last is not None and alone and stays[first - 1] and (last.count == 1 or not last.step)
        )
        if joins and last is not None:
            runs[-1] = Run(last.first, last.count + 1, last.model, last.row, 0)
        else:
            runs.append(Run(first, end - first, int(givers[first]), int(rows[first]), 1))
    return sorted(runs, key=lambda run: (run.model != model, run.first))
