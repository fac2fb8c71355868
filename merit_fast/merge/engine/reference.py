"""The engine in NumPy: what runs where no compiler was, and what the tests hold the native one against.

Sums go chunk by chunk; a tensor whose deltas have a rule is held whole.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from merit_fast.kernels.average import average_arrays, delta_gram
from merit_fast.kernels.average.deltas import DeltaRule, mix_deltas
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.engine.plan import Segment
from merit_fast.merge.engine.values import finite, nonfinite_error, values
from merit_fast.merge.read.checkpoint import ITEM_BYTES


def run(
    batch: Sequence[Segment],
    config: MergeConfig,
    files: OpenFiles,
    step: int,
    pieces: npt.NDArray[np.int64],
    grams: npt.NDArray[np.float64],
    from_base: bool,
    advance: Callable[[int], None],
) -> None:
    """One batch of segments, and the Gram matrices of its pieces; arguments as the native engine has them."""
    for segment in batch:
        if isinstance(segment.rule, DeltaRule):
            _mix(segment, segment.rule, config, files)
            advance(segment.num_elements)
        elif segment.rule:
            _sum(segment, segment.rule, config, files, step, advance)
    branches = grams.shape[1]
    for place, (number, first, count) in enumerate(pieces.tolist()):
        loaded = [values(entry, first, count, files) for entry in batch[number].inputs]
        arrays, dtypes = [array for array, _ in loaded], [dtype for _, dtype in loaded]
        base, base_dtype = (
            (arrays[branches], dtypes[branches]) if from_base else (np.zeros(count), "F64")
        )
        grams[place] = delta_gram(
            arrays[:branches], base, dtypes=dtypes[:branches], base_dtype=base_dtype
        )


def _sum(
    segment: Segment,
    coefficients: tuple[float, ...],
    config: MergeConfig,
    files: OpenFiles,
    step: int,
    advance: Callable[[int], None],
) -> None:
    for first in range(0, segment.num_elements, step):
        count = min(step, segment.num_elements - first)
        loaded = [
            values(entry, first, count, files) for entry in segment.inputs[: len(coefficients)]
        ]
        arrays, dtypes = [array for array, _ in loaded], [dtype for _, dtype in loaded]
        out = average_arrays(
            arrays, coefficients, dtypes=dtypes, out_dtype=segment.dtype, backend="eager"
        )
        _write(
            segment,
            first,
            out,
            config.allow_nonfinite or bool(finite(out, segment.dtype).all()),
            files,
        )
        advance(count)


def _mix(segment: Segment, rule: DeltaRule, config: MergeConfig, files: OpenFiles) -> None:
    loaded = [values(entry, 0, segment.num_elements, files) for entry in segment.inputs]
    arrays, dtypes = [array for array, _ in loaded], [dtype for _, dtype in loaded]
    out, good = mix_deltas(
        arrays[:-1],
        arrays[-1],
        rule,
        dtypes=dtypes[:-1],
        base_dtype=dtypes[-1],
        out_dtype=segment.dtype,
    )
    _write(segment, 0, out, config.allow_nonfinite or good, files)


def _write(segment: Segment, first: int, out: np.ndarray, good: bool, files: OpenFiles) -> None:
    if not good:
        raise nonfinite_error(segment, first, out.size, files)
    files.write(out.tobytes(), segment.output_offset + first * ITEM_BYTES[segment.dtype])
