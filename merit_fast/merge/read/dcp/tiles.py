"""Checks that boxes cover a tensor exactly once."""

import math
from collections.abc import Sequence

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
_MOST_COMPARISONS = 500_000


def tiling_fault(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """What is wrong with boxes that should tile a tensor, in one clause; None: nothing.

    Boxes without elements are not looked at. Grids, of any number of dimensions and with uneven
    cuts, take time linear in the boxes but for a sort.
    """
    filled = [box for box in boxes if 0 not in box[1]]
    for offsets, sizes in filled:
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
        if any(end > most for end, most in zip(ends, shape, strict=True)):
            return f"chunk {box_text((offsets, sizes))} lies outside the shape {list(shape)}"
    if 0 in shape:
        return None
    if not filled:
        return f"no chunk holds {box_text(([0] * len(shape), shape))}"
    if not shape:
        return "two chunks hold its one element" if len(filled) > 1 else None
    return _fault(tuple(shape), filled, ())


def box_text(box: tuple[Sequence[int], Sequence[int]]) -> str:
    """A box as an index: [0:2, 4:8]."""
    ranges = [f"{at}:{at + size}" for at, size in zip(*box, strict=True)]
    return f"[{', '.join(ranges)}]"


def _fault(shape: tuple[int, ...], boxes: Sequence[Box], fixed: tuple[Box, ...]) -> str | None:
    """Faults of boxes that agree in the first ``len(fixed)`` dimensions."""
    d = len(fixed)
    if d == len(shape):
        if len(boxes) > 1:
            return f"two chunks hold {box_text(boxes[0])}"
        return None
    groups: dict[tuple[int, int], list[Box]] = {}
    for box in boxes:
        groups.setdefault((box[0][d], box[1][d]), []).append(box)
    end = 0
    for at, size in sorted(groups):
        if at < end:  # no grid along this dimension
            return _fault_of_any(shape, boxes, fixed)
        if at > end:
            return f"no chunk holds {_hole(shape, fixed, end, at)}"
        end = at + size
    if end < shape[d]:
        return f"no chunk holds {_hole(shape, fixed, end, shape[d])}"
    for (at, size), group in groups.items():
        fault = _fault(shape, group, (*fixed, ((at,), (size,))))
        if fault:
            return fault
    return None


def _hole(shape: tuple[int, ...], fixed: tuple[Box, ...], first: int, end: int) -> str:
    rest = shape[len(fixed) + 1 :]
    offsets = [*(box[0][0] for box in fixed), first, *[0] * len(rest)]
    sizes = [*(box[1][0] for box in fixed), end - first, *rest]
    return box_text((offsets, sizes))


def _fault_of_any(
    shape: tuple[int, ...], boxes: Sequence[Box], fixed: tuple[Box, ...]
) -> str | None:
    """Compares boxes that overlap along the first free dimension, and then their volumes."""
    d = len(fixed)
    active: list[Box] = []
    compared = 0
    volume = 0
    for box in sorted(boxes):
        active = [other for other in active if other[0][d] + other[1][d] > box[0][d]]
        compared += len(active)
        if compared > _MOST_COMPARISONS:
            return f"its {len(boxes)} chunks form no grid, which is not read for so many"
        for other in active:
            if _overlap(box, other, d + 1):
                return f"chunks {box_text(other)} and {box_text(box)} overlap"
        active.append(box)
        volume += math.prod(box[1][d:])
    wanted = math.prod(shape[d:])
    if volume != wanted:
        lacking = wanted - volume
        return f"no chunk holds {lacking} of the elements of {_hole(shape, fixed, 0, shape[d])}"
    return None


def _overlap(a: Box, b: Box, first: int) -> bool:
    return all(
        a[0][d] < b[0][d] + b[1][d] and b[0][d] < a[0][d] + a[1][d] for d in range(first, len(a[0]))
    )
