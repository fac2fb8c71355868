"""What the self-check of a sketch has found, as it stands next to the files of sums."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from merit_fast.records import field, record

_BOUNDS = (1e-6, 1e-5, 1e-4, 1e-2, 1e-1)


@record
class SketchCheck:
    """The largest errors over all kinds of calls that were checked.

    Attributes:
        row_error: |s_b - S(g_b)| / |S(g_b)| of one example b, s its sketch, S ``flat_sketch`` and g
            autograd's gradient; None if no row could be checked.
        sum_error: |sum of s_b - S(sum of g_b)| / |S(sum of g_b)|.
        kinds: kinds of calls that were checked.
        note: reason why rows were not checked, where they were not.
        slow_parameters: parameters that took a backward pass per example -> reason.
    """

    row_error: float | None
    sum_error: float
    kinds: int
    note: str = ""
    slow_parameters: Mapping[str, str] = field(default_factory=dict)

    def merged(self, other: "SketchCheck") -> "SketchCheck":
        """The larger errors of both, over the kinds of both."""
        rows = [error for error in (self.row_error, other.row_error) if error is not None]
        return SketchCheck(
            max(rows, default=None),
            max(self.sum_error, other.sum_error),
            self.kinds + other.kinds,
            self.note or other.note,
            {**self.slow_parameters, **other.slow_parameters},
        )

    def __str__(self) -> str:
        worst = max(self.sum_error, self.row_error or 0.0)
        slow = ""
        if self.slow_parameters:
            slow = f"; {len(self.slow_parameters)} parameters took a backward pass per example"
        rows = f" ({self.note})" if self.note else ""
        return f"checked against autograd: {_short(worst)}{rows}{slow}"

    def bounds(self) -> dict[str, Any]:
        """JSON-ready bounds that the errors keep: equal for every run of the same sketch."""
        return {
            "row_error_below": None if self.row_error is None else _bound(self.row_error),
            "sum_error_below": _bound(self.sum_error),
            "slow_parameters": sorted(self.slow_parameters),
        }

    @classmethod
    def of_bounds(cls, bounds: Mapping[str, Any]) -> "SketchCheck":
        """The check that ``bounds`` describes, with its bounds as its errors."""
        slow = dict.fromkeys(bounds["slow_parameters"], "took a backward pass per example")
        return cls(bounds["row_error_below"], bounds["sum_error_below"], 0, slow_parameters=slow)


def merged_checks(checks: Iterable[SketchCheck | None]) -> SketchCheck | None:
    """The largest errors of several checks; None if nothing was checked."""
    found = [check for check in checks if check is not None]
    return functools.reduce(SketchCheck.merged, found) if found else None


def _bound(error: float) -> float:
    """The smallest of a few bounds: which one does not depend on rounding."""
    return next((bound for bound in _BOUNDS if error <= bound), error)


def _short(error: float) -> str:
    """2e-7 for 2.1e-07."""
    mantissa, _, exponent = f"{error:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if error else "0"
