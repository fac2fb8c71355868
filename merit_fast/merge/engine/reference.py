"""The engine in NumPy: runs without a compiler, and is the reference of the native engine's tests.

Sums go chunk by chunk; a tensor with a rule for its deltas is held whole.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from merit_fast.kernels.average import average_arrays, delta_gram
from merit_fast.kernels.average._eager import to_float64
from merit_fast.kernels.average.deltas import DeltaRule, mix_deltas
from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.kernels.average.elements import ElementRule, mix_elements
from merit_fast.kernels.average.vectors import VectorRule, mix_vectors
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.engine.plan import Segment
from merit_fast.merge.engine.values import finite, nonfinite_error, values
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.rules.function import FunctionRule


def run(
    batch: Sequence[Segment],
    config: MergeConfig,
    files: OpenFiles,
    step: int,
    pieces: npt.NDArray[np.int64],
    grams: npt.NDArray[np.float64],
    from_base: bool,
    elements_done: array[int],
) -> None:
    """Runs one batch of segments and takes the Gram matrices of its pieces."""
    for segment in batch:
        if isinstance(segment.rule, DeltaRule):
            _mix(segment, segment.rule, config, files)
            elements_done[0] += segment.num_elements
        elif isinstance(segment.rule, (ElementRule, VectorRule)):
            _mix_whole(segment, segment.rule, config, files)
            elements_done[0] += segment.num_elements
        elif isinstance(segment.rule, FunctionRule):
            _call(segment, segment.rule, config, files)
            elements_done[0] += segment.num_elements
        elif segment.rule:
            _sum(segment, segment.rule, config, files, step, elements_done)
    branches = grams.shape[1]
    for index, (number, first, count) in enumerate(pieces.tolist()):
        arrays, dtypes = _load(batch[number].inputs, first, count, files)
        base, base_dtype = (
            (arrays[branches], dtypes[branches]) if from_base else (np.zeros(count), "F64")
        )
        grams[index] = delta_gram(
            arrays[:branches], base, dtypes=dtypes[:branches], base_dtype=base_dtype
        )


def _load(
    entries: Sequence[TensorEntry], first: int, count: int, files: OpenFiles
) -> tuple[list[np.ndarray], list[str]]:
    """Elements of every input, and their dtypes."""
    loaded = [values(entry, first, count, files) for entry in entries]
    return [array for array, _ in loaded], [dtype for _, dtype in loaded]


def _sum(
    segment: Segment,
    coefficients: tuple[float, ...],
    config: MergeConfig,
    files: OpenFiles,
    step: int,
    elements_done: array[int],
) -> None:
    for first in range(0, segment.num_elements, step):
        count = min(step, segment.num_elements - first)
        arrays, dtypes = _load(segment.inputs[: len(coefficients)], first, count, files)
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
        elements_done[0] += count


def _mix(segment: Segment, rule: DeltaRule, config: MergeConfig, files: OpenFiles) -> None:
    arrays, dtypes = _load(segment.inputs, 0, segment.num_elements, files)
    out, good = mix_deltas(
        arrays[:-1],
        arrays[-1],
        rule,
        dtypes=dtypes[:-1],
        base_dtype=dtypes[-1],
        out_dtype=segment.dtype,
    )
    _write(segment, 0, out, config.allow_nonfinite or good, files)


def _mix_whole(
    segment: Segment, rule: ElementRule | VectorRule, config: MergeConfig, files: OpenFiles
) -> None:
    arrays, dtypes = _load(segment.inputs, 0, segment.num_elements, files)
    if isinstance(rule, ElementRule):
        out, good = mix_elements(arrays, rule, dtypes=dtypes, out_dtype=segment.dtype)
    else:
        out, good = mix_vectors(arrays, rule, dtypes=dtypes, out_dtype=segment.dtype)
    _write(segment, 0, out, config.allow_nonfinite or good, files)


def _call(segment: Segment, rule: FunctionRule, config: MergeConfig, files: OpenFiles) -> None:
    """Runs a user's function on one whole tensor and rounds its result once."""
    count = segment.num_elements
    inputs = [to_float64(*values(entry, 0, count, files)) for entry in segment.inputs]
    inputs = inputs[: len(rule.weights) + rule.has_base]
    if not config.allow_nonfinite and not all(np.isfinite(array).all() for array in inputs):
        raise nonfinite_error(segment, 0, count, files)
    total = rule.combine(segment.names[0], inputs, config.allow_nonfinite)
    out = average_arrays([total], [1.0], dtypes=["F64"], out_dtype=segment.dtype, backend="eager")
    good = config.allow_nonfinite or bool(finite(out, segment.dtype).all())
    _write(segment, 0, out, good, files)


def _write(segment: Segment, first: int, out: np.ndarray, good: bool, files: OpenFiles) -> None:
    if not good:
        raise nonfinite_error(segment, first, out.size, files)
    files.write(out.tobytes(), segment.output_offset + first * ITEM_BYTES[segment.dtype])
