"""Picks rows by number, so that a reader can skip what nobody wants."""

from collections.abc import Iterable


class Picker:
    """The rows that are wanted, as a reader passes over the rows of a source in order.

    Args:
        numbers: ascending row numbers from 0; None for every row.
    """

    def __init__(self, numbers: Iterable[int] | None = None) -> None:
        self._numbers = None if numbers is None else iter(numbers)
        self._position = 0
        self._next = -1
        self._advance()

    def _advance(self) -> None:
        if self._numbers is None:
            return
        number = next(self._numbers, None)
        if number is not None and number <= self._next:
            raise ValueError(f"row numbers must ascend, got {number} after {self._next}")
        self._next = -1 if number is None else number

    @property
    def is_done(self) -> bool:
        """Whether no further row is wanted."""
        return self._numbers is not None and self._next < 0

    def take(self) -> bool:
        """Passes one row; tells whether it is wanted."""
        if self._numbers is None:
            return True
        is_wanted = self._position == self._next
        self._position += 1
        if is_wanted:
            self._advance()
        return is_wanted

    def skip(self, count: int) -> bool:
        """Passes ``count`` rows if none of them is wanted; tells whether it did."""
        if self._numbers is None or 0 <= self._next < self._position + count:
            return False
        self._position += count
        return True
