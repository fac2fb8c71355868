"""The engine in C++: segments and rules become structs of merit_fast._C.

``reference`` gives the same bytes in NumPy.
"""

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
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.engine.plan import Segment
from merit_fast.merge.engine.sources import CODES, SourceBuilder
from merit_fast.merge.engine.values import nonfinite_error

Advance = Callable[[int], None]  # receives the number of elements done since the last call


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
    builder = SourceBuilder(native, files)
    segments = [_segment(segment, builder) for segment in batch]
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


def _segment(segment: Segment, builder: SourceBuilder) -> Any:
    return builder.native.Segment(
        elements=segment.num_elements,
        output_fd=builder.files.output,
        output_offset=segment.output_offset,
        output_type=CODES[segment.dtype],
        inputs=[builder.source(entry) for entry in segment.inputs],
        weights=list(segment.rule) if isinstance(segment.rule, tuple) else [],
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
