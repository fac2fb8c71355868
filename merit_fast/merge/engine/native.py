"""The engine in C++: segments and rules become structs of merit_fast._C.

``reference`` gives the same bytes in NumPy.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from merit_fast.errors import MeritFastError
from merit_fast.kernels import dispatch
from merit_fast.kernels.average.deltas import DeltaRule
from merit_fast.kernels.average.dtypes import FLOAT_DTYPES
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.decode import whole_grid
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.engine.plan import Segment
from merit_fast.merge.engine.values import factors, nonfinite_error
from merit_fast.merge.read.entries import (
    AssembledEntry,
    ChangedEntry,
    DecodedEntry,
    LowRank,
    TensorEntry,
)

Advance = Callable[[int], None]  # receives the number of elements done since the last call
_CODES = {dtype: code for dtype, (code, _) in FLOAT_DTYPES.items()}
_WHOLE = 1 << 62  # rows or columns of a block that covers any tensor


def run(
    batch: Sequence[Segment],
    config: MergeConfig,
    files: OpenFiles,
    step: int,
    pieces: npt.NDArray[np.int64],
    grams: npt.NDArray[np.float64],
    from_base: bool,
    advance: Advance,
) -> None:
    """Merges one batch of segments and fills the Gram matrices of its pieces.

    Args:
        step: elements of a chunk.
        pieces: [P, 3] segment, first element, elements.
        grams: [P, branches, branches], filled.
        from_base: Gram matrices are of deltas from the last input; else of the inputs.
        advance: called with the number of elements that are done since the last call.
    """
    native = dispatch.native()
    builder = _Builder(native, files)
    segments = [builder.segment(segment) for segment in batch]
    rule = batch[0].rule
    elements_done = np.zeros(1, np.int64)
    shared = {
        "read": files.remote_read,
        "chunk_elements": step,
        "threads": config.threads,
        "allow_nonfinite": config.allow_nonfinite,
        "write_early": config.fsync,
        "pieces": pieces,
        "gram": grams,
        "elements_done": elements_done,
    }
    with _watch(elements_done, advance):
        if isinstance(rule, DeltaRule):
            tensor_rule = native.TensorRule(**asdict(rule))
            result = native.merge_deltas(tensor=segments[0], rule=tensor_rule, **shared)
        else:
            result = native.merge_sums(segments=segments, from_base=from_base, **shared)
    if result.nonfinite:
        raise nonfinite_error(batch[result.segment], result.element, step, files)
    if result.error:
        files.raise_remote()
        segment = batch[result.segment]
        where = segment.inputs[result.input].file if result.input >= 0 else "output"
        reason = os.strerror(result.error)
        raise MeritFastError(f"{where}: {reason} while merging {segment.names[0]}")


def reads(entry: TensorEntry) -> bool:
    """Whether the C++ engine reads this form; ``reference`` reads all of them."""
    if isinstance(entry, ChangedEntry):
        assert entry.source is not None
        return len(entry.changes) == 1 and reads(entry.source)
    if isinstance(entry, DecodedEntry):
        return _is_simple(entry)
    return not isinstance(entry, AssembledEntry)


def _is_simple(entry: DecodedEntry) -> bool:
    """Whether it is of 8-bit floats with one grid of scales over all rows."""
    if entry.dtype not in ("F8_E4M3", "F8_E5M2") or len(entry.grids) > 1 or entry.zeros:
        return False
    rows = math.prod(entry.shape[:-1])
    return all(grid.rows == rows or grid.rows % grid.block_rows == 0 for grid in entry.scales)


class _Builder:
    """Builds the structs of merit_fast._C; keeps the small arrays that they point to."""

    def __init__(self, native: Any, files: OpenFiles) -> None:
        self.native = native
        self.files = files
        self._kept: list[npt.NDArray[Any]] = []

    def segment(self, segment: Segment) -> Any:
        return self.native.Segment(
            elements=segment.num_elements,
            output_fd=self.files.output,
            output_offset=segment.output_offset,
            output_type=_CODES[segment.dtype],
            inputs=[self._source(entry) for entry in segment.inputs],
            weights=list(segment.rule) if isinstance(segment.rule, tuple) else [],
        )

    def _source(self, entry: TensorEntry) -> Any:
        scales = low_rank = None
        cols = entry.shape[-1] if entry.shape else 1
        if isinstance(entry, ChangedEntry):
            assert entry.source is not None
            low_rank = self._low_rank(entry.changes[0], cols)
            entry = entry.source
        if isinstance(entry, DecodedEntry):
            scales = self._scales(entry, cols)
        return self.native.Source(
            file=self.files.number(entry.file),
            offset=entry.offset,
            stored=_CODES.get(entry.dtype, 0),
            scales=scales,
            low_rank=low_rank,
        )

    def _scales(self, entry: DecodedEntry, cols: int) -> Any:
        scale = entry.scales[0] if entry.scales else None
        grid = whole_grid(scale, self.files) if scale else np.ones((1, 1))
        self._kept.append(grid)
        return self.native.Scales(
            e5m2=entry.dtype == "F8_E5M2",
            cols=cols,
            block_rows=scale.block_rows if scale else _WHOLE,
            block_cols=scale.block_cols if scale else _WHOLE,
            scale_cols=grid.shape[1],
            values=grid.ctypes.data,
        )

    def _low_rank(self, change: LowRank, cols: int) -> Any:
        pair = factors(change, self.files)
        self._kept.extend(pair)
        left, right = pair
        return self.native.LowRank(
            left=left.ctypes.data,
            right=right.ctypes.data,
            rank=left.shape[1],
            cols=cols,
            factor=change.scaling,
        )


@contextmanager
def _watch(elements_done: npt.NDArray[np.int64], advance: Advance) -> Iterator[None]:
    """Reports a counter that C++ advances while it does not hold the GIL."""
    stop = threading.Event()
    reported = 0

    def report() -> None:
        nonlocal reported
        now = int(elements_done[0])
        advance(now - reported)
        reported = now

    def watch() -> None:
        while not stop.wait(0.1):
            report()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        report()
