"""Tensors made of boxes of other tensors: joined, cut, turned. Only shapes and places, no data.

Each function is the counterpart of an operation of transformers.core_model_loading on views.
"""

import math
from collections.abc import Sequence

from merit_fast.merge.read.entries import Part, TensorEntry
from merit_fast.records import record, replace


@record
class View:
    """A tensor of ``shape`` whose elements lie in ``parts``, each in one."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def whole(entry: TensorEntry) -> View:
    """The view of one tensor as it is."""
    none = (0,) * len(entry.shape)
    ones = (1,) * len(entry.shape)
    part = Part(entry, none, entry.shape, 0, contiguous(entry.shape), ones)
    return View(entry.shape, (part,))


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a row-major tensor, in elements."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def stack(views: Sequence[View], dim: int) -> View:
    """torch.stack(views, dim); all views have one shape."""
    parts = []
    for place, view in enumerate(views):
        for part in view.parts:
            added = replace(
                part,
                offsets=_inserted(part.offsets, dim, place),
                sizes=_inserted(part.sizes, dim, 1),
                strides=_inserted(part.strides, dim, 0),
                steps=_inserted(part.steps, dim, 1),
            )
            parts.append(added)
    return View(_inserted(views[0].shape, dim, len(views)), tuple(parts))


def concatenate(views: Sequence[View], dim: int) -> View:
    """torch.cat(views, dim); the other dimensions agree."""
    parts = []
    end = 0
    for view in views:
        for part in view.parts:
            offset = part.offsets[dim] + end
            parts.append(replace(part, offsets=_set(part.offsets, dim, offset)))
        end += view.shape[dim]
    return View(_set(views[0].shape, dim, end), tuple(parts))


def cut(view: View, dim: int, first: int, end: int) -> View:
    """view.narrow(dim, first, end - first)"""
    parts = []
    for part in view.parts:
        step = part.steps[dim]
        low = max(-(-(first - part.offsets[dim]) // step), 0)
        high = min(-(-(end - part.offsets[dim]) // step), part.sizes[dim])
        if low < high:
            taken = _every(part, dim, low, high, 1)
            parts.append(
                replace(taken, offsets=_set(taken.offsets, dim, taken.offsets[dim] - first))
            )
    return View(_set(view.shape, dim, end - first), tuple(parts))


def split(view: View, dim: int, sizes: Sequence[int]) -> list[View]:
    """view.split(sizes, dim)"""
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [cut(view, dim, at, at + size) for at, size in zip(starts, sizes, strict=True)]


def chunk(view: View, dim: int, count: int) -> list[View]:
    """torch.chunk(view, count, dim): ``count`` pieces, of which the last may be shorter."""
    size = -(-view.shape[dim] // count) or 1
    rest = view.shape[dim]
    sizes = []
    while rest > 0:
        sizes.append(min(size, rest))
        rest -= size
    return split(view, dim, sizes)


def transpose(view: View, first: int, second: int) -> View:
    """view.transpose(first, second)"""

    def swapped(values: tuple[int, ...]) -> tuple[int, ...]:
        return _set(_set(values, first, values[second]), second, values[first])

    parts = tuple(
        replace(
            part,
            offsets=swapped(part.offsets),
            sizes=swapped(part.sizes),
            strides=swapped(part.strides),
            steps=swapped(part.steps),
        )
        for part in view.parts
    )
    return View(swapped(view.shape), parts)


def interleave(view: View, dim: int, inverse: bool = False) -> View:
    """Even places first, then odd ones: view.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).

    ``inverse``: the first half on even places, the second on odd ones. The shape stays.
    """
    half = view.shape[dim] // 2
    parts = []
    if inverse:
        for odd, piece in enumerate(split(view, dim, (half, half))):
            for part in piece.parts:
                offset = 2 * part.offsets[dim] + odd
                parts.append(_placed(part, dim, offset, 2 * part.steps[dim]))
        return View(view.shape, tuple(parts))
    for part in view.parts:
        is_mixed = part.steps[dim] % 2 == 1 and part.sizes[dim] > 1
        for first in range(2 if is_mixed else 1):
            taken = _every(part, dim, first, part.sizes[dim], 2 if is_mixed else 1)
            offset = taken.offsets[dim] // 2 + half * (taken.offsets[dim] % 2)
            parts.append(_placed(taken, dim, offset, max(taken.steps[dim] // 2, 1)))
    return View(view.shape, tuple(parts))


def _placed(part: Part, dim: int, offset: int, step: int) -> Part:
    offsets = _set(part.offsets, dim, offset)
    return replace(part, offsets=offsets, steps=_set(part.steps, dim, step))


def _every(part: Part, dim: int, first: int, end: int, stride: int) -> Part:
    """The part's indices first, first + stride, ... below ``end`` along a dimension."""
    return replace(
        part,
        offsets=_set(part.offsets, dim, part.offsets[dim] + part.steps[dim] * first),
        sizes=_set(part.sizes, dim, -(-(end - first) // stride)),
        start=part.start + part.strides[dim] * first,
        strides=_set(part.strides, dim, part.strides[dim] * stride),
        steps=_set(part.steps, dim, part.steps[dim] * stride),
    )


def _set(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _inserted(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim:])
