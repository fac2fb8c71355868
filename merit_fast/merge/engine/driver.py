"""The engine's driver: opens files and hands byte ranges to C++ or NumPy.

Memory is threads x (K + 1) x chunk, whatever the model's size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.kernels import dispatch
from merit_fast.kernels.average.deltas import SQUARES_CHUNK, DeltaRule
from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.kernels.average.elements import ElementRule
from merit_fast.kernels.average.vectors import VectorRule
from merit_fast.kernels.lazy import np
from merit_fast.manifests.following import FollowingHash
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.compiled import native
from merit_fast.merge.engine.compiled.native import Advance
from merit_fast.merge.engine.compiled.sources import held_bytes
from merit_fast.merge.engine.notes.counters import is_counter, largest
from merit_fast.merge.engine.opened import OpenFiles, open_files
from merit_fast.merge.engine.plan import Rule, Segment, Shard
from merit_fast.merge.engine.quantise.rounding import write_shard_roundings
from merit_fast.merge.engine.values import Array, values
from merit_fast.merge.read.entries import files_of, is_float, value_dtype
from merit_fast.merge.read.remote import Location
from merit_fast.merge.rules.function import FunctionRule
from merit_fast.records import record, replace

GRAM_CHUNK = SQUARES_CHUNK  # elements; sums are joined chunk by chunk, so one size gives one result

_MOST_HELD = 8 << 20  # bytes


@record
class WrittenShard:
    """What is known of a file that is written.

    Attributes:
        grams: with ``config.stats``, each tensor's Gram matrix of the deltas from its last input,
            the base; else nothing.
        digest: XXH3, 128 bits, of the file in hex; None: it was not wanted.
    """

    grams: dict[str, Array]
    digest: str | None


def write_shard(
    shard: Shard,
    config: MergeConfig,
    path: Path,
    advance: Advance,
    backend: str | None = None,
    hashed: bool = True,
) -> WrittenShard:
    """Writes one output file by its segments' rules: created, preallocated, not fsynced.

    Raises:
        InputError: a value is not finite, an integer tensor differs, an input is shorter than its
            header says.
        MeritFastError: reading or writing failed, the disk is full.
    """
    with (
        open_files(input_files((*shard.segments, *shard.copies)), path) as opened,
        closing(_hash_of_output(shard, opened, backend)) if hashed else nullcontext() as digest,
    ):
        os.posix_fallocate(opened.output, 0, shard.num_bytes)
        opened.write(shard.header, 0)
        if shard.frame is not None:
            shard.frame.begin(opened.output)
        engine = _Engine(config, opened, config.stats, config.stats, advance, backend)
        grams = engine.run([segment for segment in shard.segments if not segment.encoding])
        roundings = {}
        for segment in filter(lambda segment: segment.encoding, shard.segments):
            from merit_fast.merge.engine.quantise.stream import (
                encode_tensor,
                scratch_output,
                unencoded,
            )

            with scratch_output(opened, path.parent) as scratch:
                engine.opened = scratch
                grams |= engine.run([unencoded(segment)])
                roundings[segment.names[0]] = encode_tensor(
                    segment, scratch, opened, engine.is_native, config.threads
                )
        for segment in shard.copies:
            if segment.num_elements:
                _copy_equal(segment, opened)
        if shard.frame is not None:
            shard.frame.finish(opened.output, config.threads)
        written = WrittenShard(grams, digest.finish(shard.num_bytes) if digest else None)
    write_shard_roundings(path.parent, shard, roundings)
    return written


def _hash_of_output(shard: Shard, opened: OpenFiles, backend: str | None) -> FollowingHash:
    """The hash of a shard that begins now; it follows the engine where no byte changes again."""
    if shard.frame is None and _is_native(backend):
        opened.written = dispatch.native().Written()
        return FollowingHash(opened.output, opened.written.prefix)
    return FollowingHash(opened.output, lambda: 0)


def _is_native(backend: str | None) -> bool:
    return dispatch.choose("merge_files", "cpu", backend) == "cpu"


def gram_shard(
    shard: Shard, config: MergeConfig, from_base: bool, advance: Advance, backend: str | None = None
) -> dict[str, Array]:
    """Reads one shard of every input and writes nothing: each float tensor's Gram matrix.

    Args:
        shard: of a plan without rules.
        from_base: the last input is the base, and the others' deltas from it count; else the
            inputs.

    Raises:
        as ``write_shard``.
    """
    with open_files(input_files(shard.segments), None) as opened:
        return _Engine(config, opened, True, from_base, advance, backend).run(shard.segments)


def merge_tensor(
    segment: Segment,
    config: MergeConfig,
    opened: OpenFiles,
    address: int,
    backend: str | None = None,
) -> None:
    """Makes one tensor in memory by its rule; integer tensors must be equal and are copied.

    Args:
        segment: one tensor, float or not; its output offset does not count.
        opened: holds ``input_files`` of the segment, and no output.
        address: memory for all of the tensor's elements; the caller keeps it.

    Raises:
        as ``write_shard``.
    """
    placed = replace(segment, output_offset=address)
    if is_float(segment.inputs[0]):
        _Engine(config, opened, False, False, None, backend).run([placed])
    else:
        _copy_equal(placed, opened)


def input_files(segments: Iterable[Segment]) -> set[Location]:
    """Files that hold the inputs of segments."""
    return files_of(entry for segment in segments for entry in segment.inputs)


def chunk_elements(segment: Segment, chunk_bytes: int) -> int:
    """Elements of a chunk: ``chunk_bytes`` of the widest type that takes part."""
    inputs = [ITEM_BYTES[value_dtype(entry)] for entry in segment.inputs]
    return max(chunk_bytes // max(ITEM_BYTES[segment.dtype], *inputs), 1)


class _Engine:
    """Passes over a shard's segments, many in one call."""

    def __init__(
        self,
        config: MergeConfig,
        opened: OpenFiles,
        takes_gram: bool,
        from_base: bool,
        advance: Advance | None,
        backend: str | None,
    ) -> None:
        self.config = config
        self.opened = opened
        self.advance = advance
        self.takes_gram = takes_gram
        self.from_base = from_base
        self.is_native = _is_native(backend)

    def run(self, segments: Sequence[Segment]) -> dict[str, Array]:
        grams: dict[str, Array] = {}
        with native.watch(self.advance) as elements_done:
            for batch in self._batches(segments):
                pieces, gram = self._pieces(batch)
                self._run(batch)(
                    batch,
                    self.config,
                    self.opened,
                    self._step(batch[0]),
                    pieces,
                    gram,
                    self.from_base,
                    elements_done,
                )
                if self.takes_gram:
                    from merit_fast.merge.engine.geometry import gram_by_tensor

                    grams |= gram_by_tensor(batch, pieces, gram)
        return grams

    def _batches(self, segments: Iterable[Segment]) -> list[list[Segment]]:
        """Segments by call: those of one kind of rule, size of chunks and number of inputs.

        Small arrays of a batch, such as scales and factors, take at most ``_MOST_HELD`` bytes.
        """
        batches: list[list[Segment]] = []
        room: dict[tuple[str, int, int], tuple[list[Segment], int]] = {}  # open batch, bytes held
        for segment in segments:
            key = (type(segment.rule).__name__, self._step(segment), len(segment.inputs))
            batch, held = room.get(key, ([], 0))
            held += sum(held_bytes(entry) for entry in segment.inputs)
            if not batch or held > _MOST_HELD:
                batch = []
                batches.append(batch)
                held = sum(held_bytes(entry) for entry in segment.inputs)
            batch.append(segment)
            room[key] = (batch, held)
        return batches

    def _run(self, batch: Sequence[Segment]) -> Callable[..., None]:
        """The pass over a batch: compiled, or its definition in NumPy."""
        if self.is_native and not isinstance(batch[0].rule, FunctionRule):
            return native.run
        from merit_fast.merge.engine import reference

        return reference.run

    def _pieces(self, batch: Sequence[Segment]) -> tuple[Any, Any]:
        if not self.takes_gram:
            return native.NO_PIECES, native.NO_GRAMS
        from merit_fast.merge.engine.geometry import cut_pieces

        pieces = cut_pieces(batch, self._step(batch[0]))
        branches = len(batch[0].inputs) - int(self.from_base)
        return pieces, np.zeros((len(pieces), branches, branches))

    def _step(self, segment: Segment) -> int:
        rule = segment.rule
        if isinstance(rule, DeltaRule) and self.takes_gram and rule.row:
            return max(rule.row, GRAM_CHUNK // rule.row * rule.row)
        has_sums = isinstance(rule, DeltaRule) and (rule.weigh_by_squares or rule.restore_sizes)
        if self.takes_gram or has_sums:
            return GRAM_CHUNK
        step = chunk_elements(segment, self.config.chunk_kib * 1024)
        row = whole_rows(rule)
        return max(row, step // row * row)


def whole_rows(rule: Rule) -> int:
    """Elements that a chunk of the engine must not part; 1: any may be parted."""
    if isinstance(rule, VectorRule):
        return 1 if rule.period else rule.length
    return max(rule.row, 1) if isinstance(rule, (DeltaRule, ElementRule)) else 1


def _copy_equal(segment: Segment, files: OpenFiles) -> None:
    item = ITEM_BYTES[segment.dtype]
    step = (1 << 20) // item
    for at in range(0, segment.num_elements, step):
        count = min(step, segment.num_elements - at)
        chunks = [values(entry, at, count, files)[0].tobytes() for entry in segment.inputs]
        if is_counter(segment.inputs[0]):
            chunks = [largest(segment.inputs[0], chunks)] * len(chunks)
        for entry, chunk in zip(segment.inputs, chunks, strict=True):
            if chunk != chunks[0]:
                raise InputError(
                    f"{entry.file}: {entry.name}: a {entry.dtype} tensor cannot be averaged "
                    f"and must equal that of {segment.inputs[0].file}"
                )
        files.write(chunks[0], segment.output_offset + at * item)
