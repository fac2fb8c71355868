"""Rows that a split expression of ``datasets`` selects, such as ``train[:10%]``."""

from collections.abc import Iterable, Iterator, Mapping

from merit_fast.data.sources.source import Source
from merit_fast.data.sources.split_names import spellings
from merit_fast.errors import InputError, one_line


def sliced_numbers(
    source: Source, counts: Mapping[str, int], only: Iterable[int] | None
) -> Iterator[int]:
    """Row numbers in the files of the splits, one split behind the other, ascending.

    Args:
        source: its split is the expression.
        counts: rows of each split that the expression names, in the order of the files.
        only: ascending numbers of rows among the selected ones; None: all of them.

    Raises:
        InputError: the expression is wrong, or selects rows twice or against their order.
    """
    import datasets

    sizes = {name: count for split, count in counts.items() for name in spellings(split)}
    starts: dict[str, int] = {}
    start = 0
    for split, count in counts.items():
        starts |= dict.fromkeys(spellings(split), start)
        start += count
    try:
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(sizes)
    except (ValueError, AssertionError, KeyError) as error:
        raise _error(source, one_line(error)) from None
    ranges = []
    for part in parts:
        start = starts[part.splitname]
        last = sizes[part.splitname] if part.to is None else part.to
        ranges.append(range(start + (part.from_ or 0), start + last))
    for before, after in zip(ranges, ranges[1:], strict=False):
        if after.start < before.stop:
            raise _error(source, "rows must ascend, each once")
    return _numbers(ranges, only)


def _numbers(ranges: list[range], only: Iterable[int] | None) -> Iterator[int]:
    if only is None:
        for numbers in ranges:
            yield from numbers
        return
    passed = 0
    remaining = iter(ranges)
    current = next(remaining, range(0))
    for number in only:
        while number - passed >= len(current):
            passed += len(current)
            following = next(remaining, None)
            if following is None:
                return
            current = following
        yield current[number - passed]


def _error(source: Source, reason: str) -> InputError:
    rule = "split: must be an expression of splits"
    return InputError(f"{source.path}: {rule}, got {source.split!r}: {reason}")
