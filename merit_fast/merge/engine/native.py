"""The call into the native engine: entries and rules as its arguments, its answers as errors."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import numpy as np
import numpy.typing as npt

from merit_fast.errors import MeritFastError
from merit_fast.kernels.average.deltas import DeltaRule
from merit_fast.kernels.average.dtypes import FLOAT_DTYPES
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.geometry import Array
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.engine.plan import Segment
from merit_fast.merge.engine.values import factors, nonfinite_error, scale_grid
from merit_fast.merge.read.checkpoint import TensorEntry
from merit_fast.merge.read.decoded import DecodedEntry

Advance = Callable[[int], None]  # receives the number of elements done since the last call
_CODES = {dtype: code for dtype, (code, _) in FLOAT_DTYPES.items()}
_NO_BLOCKS = (1 << 62, 1 << 62)


def run_native(
    native: Any,
    batch: Sequence[Segment],
    config: MergeConfig,
    opened: OpenFiles,
    step: int,
    pieces: npt.NDArray[np.int64],
    gram: Array,
    from_base: bool,
    advance: Advance,
) -> None:
    """Runs one batch of segments; fills ``gram`` piece by piece. Arguments as in ``reference.run``.

    Raises:
        InputError: a value is not finite.
        MeritFastError: reading or writing failed.
    """
    alive: list[np.ndarray] = []  # small arrays that the engine's pointers lead to
    packed = [
        (
            segment.num_elements,
            opened.output,
            segment.output_offset,
            _CODES[segment.dtype],
            [_source(native, entry, opened, alive) for entry in segment.inputs],
        )
        for segment in batch
    ]
    done = np.zeros(1, np.int64)
    rule = batch[0].rule
    with _watch(done, advance):
        if isinstance(rule, DeltaRule):
            result = native.merge_deltas(
                packed[0], native.TensorRule(*astuple(rule)), opened.remote_read, step,
                config.threads, config.allow_nonfinite, config.fsync, pieces, gram, done,
            )  # fmt: skip
        else:
            coefficients = [list(segment.rule) for segment in batch]  # type: ignore[arg-type]
            result = native.merge_sums(
                packed, coefficients, opened.remote_read, step, config.threads,
                config.allow_nonfinite, config.fsync, pieces, gram, from_base, done,
            )  # fmt: skip
    error, number, element, source, is_nonfinite = result
    if is_nonfinite:
        raise nonfinite_error(batch[number], element, step, opened)
    if error:
        opened.raise_remote()
        file = batch[number].inputs[source].file if source >= 0 else "output"
        raise MeritFastError(f"{file}: {os.strerror(error)} while merging {batch[number].names[0]}")


def _source(native: Any, entry: TensorEntry, opened: OpenFiles, alive: list[np.ndarray]) -> Any:
    """The engine's view of an input. ``alive`` keeps the small arrays that it points to."""
    source = native.Source(opened.number(entry.file), entry.offset, _CODES.get(entry.dtype, 0))
    if not isinstance(entry, DecodedEntry):
        return source
    cols = entry.shape[-1] if entry.shape else 1
    if entry.dtype not in FLOAT_DTYPES:
        scales = entry.scales
        grid = scale_grid(scales, opened) if scales else np.ones((1, 1))
        block = (scales.block_rows, scales.block_cols) if scales else _NO_BLOCKS
        alive.append(grid)
        source.scale(entry.dtype == "F8_E5M2", cols, *block, grid.shape[1], grid.ctypes.data)
    pair = factors(entry, opened)
    if pair is not None and entry.low_rank is not None:
        alive.extend(pair)
        left, right = pair
        rank = left.shape[1]
        scaling = entry.low_rank.scaling
        source.add_low_rank(left.ctypes.data, right.ctypes.data, rank, cols, scaling)
    return source


@contextmanager
def _watch(done: npt.NDArray[np.int64], advance: Advance) -> Iterator[None]:
    """Reports a counter that C++ advances without holding the GIL."""
    stop = threading.Event()
    reported = 0

    def report() -> None:
        nonlocal reported
        now = int(done[0])
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
