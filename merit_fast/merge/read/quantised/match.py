"""One stored tensor of codes, and the scales next to it, as a decoded tensor."""

import math
import struct
from collections.abc import Iterator, Mapping

from merit_fast.errors import InputError
from merit_fast.merge.read.entries import AssembledEntry, DecodedEntry, Grid, Part, TensorEntry
from merit_fast.merge.read.files import open_regular
from merit_fast.merge.read.quantised.codes import CODES, stem_of
from merit_fast.merge.read.quantised.formats import FORMATS, LAYER_SCALES, Format
from merit_fast.merge.read.quantised.grids import find_grid
from merit_fast.merge.read.quantised.scheme import Scheme
from merit_fast.records import record, replace

_WEIGHT = ".weight"
_WORD_BITS = 32
_SHAPE_BYTES = {"I64": "<qq", "I32": "<ii"}
_LARGEST = 2**40  # elements in a row or a column


class MisfitError(Exception):
    """A format whose names fit and whose shapes or dtypes do not."""


@record
class _Found:
    """Stored tensors of one quantised tensor, by the names of a format's row."""

    form: Format
    name: str  # of the tensor
    codes: TensorEntry
    scale: TensorEntry
    tensors: Mapping[str, TensorEntry]

    def part(self, pattern: str) -> TensorEntry | None:
        return self.tensors.get(_filled(pattern, self.name)) if pattern else None


def match_codes(
    codes: TensorEntry, tensors: Mapping[str, TensorEntry], scheme: Scheme
) -> tuple[TensorEntry, DecodedEntry] | None:
    """The decoded tensor of some codes, and its description; None if they are no codes.

    Returns:
        (the tensor as the model has it, the quantised tensor it is made of).

    Raises:
        InputError: scales are there, and fit in no format of the table.
    """
    reason = ""
    for found in _candidates(codes, tensors, scheme):
        try:
            decoded = _decoded(found, scheme)
        except MisfitError as error:
            reason = reason or str(error)
            continue
        return (_transposed(decoded) if found.form.is_transposed else decoded), decoded
    if reason:
        raise InputError(reason)
    return None


def _candidates(
    codes: TensorEntry, tensors: Mapping[str, TensorEntry], scheme: Scheme
) -> Iterator[_Found]:
    for form in FORMATS:
        ending = form.codes.removeprefix("{}")
        if codes.dtype not in form.stored or not codes.name.endswith(ending):
            continue
        if form.methods and scheme.method not in form.methods:
            continue
        name = codes.name.removesuffix(ending) if ending else codes.name
        scale_names = [_filled(pattern, name) for pattern in form.scales]
        scales = [tensors[each] for each in scale_names if each in tensors]
        if form.second and _filled(form.second, name) not in tensors:
            continue
        if len(scales) > 1:
            raise InputError(
                f"{codes.file}: {scales[1].name}: is a second scale of {name}, next "
                f"to {scales[0].name}"
            )
        if scales:
            yield _Found(form, name, codes, scales[0], tensors)


def _filled(pattern: str, name: str) -> str:
    if "{module}" not in pattern:
        return pattern.format(name)
    return pattern.format(module=stem_of(name)) if name.endswith(_WEIGHT) else ""


def _decoded(found: _Found, scheme: Scheme) -> DecodedEntry:
    form = found.form
    codes = found.codes
    if found.scale.dtype not in form.scale_dtypes:
        kinds = sorted(
            {
                kind
                for each in FORMATS
                for kind in each.scale_dtypes
                if each.codes == form.codes and codes.dtype in each.stored
            }
        )
        raise MisfitError(
            f"{found.scale.file}: {found.scale.name}: a scale must be of dtype "
            f"{', '.join(kinds)}, got {found.scale.dtype}"
        )
    kind, shape = _shape(found, scheme)
    scale = _grid(found, found.scale, shape, scheme)
    scales = [scale]
    if second := found.part(form.second):
        scales.append(replace(_grid(found, second, shape, scheme), divides=form.divides))
    zero = found.part(form.zero)
    order = found.part(form.order)
    size = found.part(form.shape)
    zeros = _zeros(found, zero, scale, kind, shape) if zero else None
    if order:
        _check_order(order, shape, scale)
        scales[0] = replace(scale, columns=order)
        zeros = replace(zeros, columns=order) if zeros else None
    own = [codes, found.scale, second, zero, order, size, *_layer_scales(found)]
    stored = [entry for entry in own if entry is not None]
    stem = stem_of(found.name)
    return DecodedEntry(
        found.name,
        kind,
        shape,
        codes.file,
        codes.offset,
        sum(entry.num_bytes for entry in (codes, *(grid.entry for grid in scales))),
        codes=codes,
        scales=tuple(scales),
        zeros=zeros,
        parts=tuple((entry.name[len(stem) :], entry) for entry in stored),
        form=form.name,
    )


def _shape(found: _Found, scheme: Scheme) -> tuple[str, tuple[int, ...]]:
    """(kind of code, shape of the tensor)."""
    form = found.form
    codes = found.codes
    if form.shape:
        return _shape_of_words(found, scheme)
    kind = form.code or codes.dtype
    bits = CODES[kind].bits
    if codes.dtype == kind or bits == 8:
        return kind, codes.shape
    sizes = codes.shape
    if form.is_transposed and len(sizes) == 4:  # [experts, rows, blocks, bytes of a block]
        sizes = (*sizes[:2], sizes[2] * sizes[3])
    elif form.is_transposed:
        raise MisfitError(
            f"{codes.file}: {codes.name}: must have 4 dimensions, got {list(codes.shape)}"
        )
    if not sizes or sizes[-1] * 8 % bits:
        raise MisfitError(
            f"{codes.file}: {codes.name}: must hold whole rows of {bits} bits, got "
            f"{list(codes.shape)}"
        )
    return kind, (*sizes[:-1], sizes[-1] * 8 // bits)


def _shape_of_words(found: _Found, scheme: Scheme) -> tuple[str, tuple[int, ...]]:
    codes = found.codes
    size = found.part(found.form.shape)
    if size is None or size.dtype not in _SHAPE_BYTES or size.shape != (2,):
        raise MisfitError(
            f"{codes.file}: {codes.name}: needs "
            f"{_filled(found.form.shape, found.name)} of two integers next to it"
        )
    with open_regular(size.file) as opened:
        opened.seek(size.offset)
        rows, columns = struct.unpack(_SHAPE_BYTES[size.dtype], opened.read(size.num_bytes))
    widths = [
        bits
        for bits in scheme.widths
        if 1 <= bits <= 8 and codes.shape == (rows, -(-columns * bits // _WORD_BITS))
    ]
    if not 0 < columns < _LARGEST or len(widths) != 1:
        raise MisfitError(
            f"{codes.file}: {codes.name}: must hold {rows} x {columns} integers of the num_bits "
            f"in config.json {list(scheme.widths)}, got {list(codes.shape)} words"
        )
    return f"INT{widths[0]}", (rows, columns)


def _grid(found: _Found, scale: TensorEntry, shape: tuple[int, ...], scheme: Scheme) -> Grid:
    only = found.form.block if scale is found.scale else None
    grid = find_grid(scale, shape, scheme.blocks, only, scheme.names_blocks)
    if isinstance(grid, str):
        raise MisfitError(
            f"{scale.file}: {scale.name}: {grid} of {found.name} {list(shape)}, got "
            f"{list(scale.shape)}"
        )
    return grid


def _zeros(
    found: _Found, zero: TensorEntry, scale: Grid, kind: str, shape: tuple[int, ...]
) -> Grid:
    if zero.dtype == "I8" and zero.num_elements == scale.entry.num_elements:
        return replace(scale, entry=zero, code="I8")
    bits = CODES[kind].bits
    words = (-(-scale.shape[0] * bits // _WORD_BITS), scale.shape[1])
    if len(shape) != 2 or zero.dtype != "I32" or zero.shape != words:
        raise MisfitError(
            f"{zero.file}: {zero.name}: must be zero points of {found.name}, I32 "
            f"{list(words)}, got {zero.dtype} {list(zero.shape)}"
        )
    return replace(scale, entry=zero, code=kind, packed_rows=True)


def _check_order(order: TensorEntry, shape: tuple[int, ...], scale: Grid) -> None:
    rule = f"must be {shape[-1]} numbers below {scale.shape[1]}"
    if order.dtype != "I32" or order.shape != shape[-1:]:
        raise MisfitError(
            f"{order.file}: {order.name}: {rule}, got {order.dtype} {list(order.shape)}"
        )
    with open_regular(order.file) as opened:
        opened.seek(order.offset)
        numbers = struct.unpack(f"<{shape[-1]}i", opened.read(order.num_bytes))
    wrong = [number for number in numbers if not 0 <= number < scale.shape[1]]
    if wrong:
        raise MisfitError(f"{order.file}: {order.name}: {rule}, got {wrong[0]}")


def _layer_scales(found: _Found) -> list[TensorEntry]:
    stem = stem_of(found.name)
    names = [f"{stem}.{ending}" for ending in LAYER_SCALES]
    if stem == found.name:  # a parameter of stacked experts
        names += [f"{stem}_{ending}" for ending in LAYER_SCALES]
    return [found.tensors[name] for name in names if name in found.tensors]


def _transposed(source: DecodedEntry) -> AssembledEntry:
    """[E, rows, columns] as [E, columns, rows]."""
    experts, rows, columns = source.shape
    part = Part(
        source, (0, 0, 0), (experts, columns, rows), 0, (math.prod(source.shape[1:]), 1, columns)
    )
    shape = (experts, columns, rows)
    place = (source.file, source.offset, source.num_bytes)
    return AssembledEntry(source.name, "F64", shape, *place, parts=(part,))
