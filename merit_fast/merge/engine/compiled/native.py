"""The engine in C++: segments and rules become structs of merit_fast._C.

``reference`` gives the same bytes in NumPy.
"""

from __future__ import annotations

import math
import os
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from merit_fast.errors import MeritFastError
from merit_fast.kernels import dispatch
from merit_fast.kernels.average.deltas import DeltaRule
from merit_fast.kernels.average.elements import ElementRule
from merit_fast.kernels.average.vectors import VectorRule
from merit_fast.kernels.lazy import np
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.compiled.sources import CODES, SourceBuilder
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.engine.plan import Rule, Segment
from merit_fast.merge.engine.values import nonfinite_error
from merit_fast.records import fields, to_dict

if TYPE_CHECKING:
    import numpy.typing as npt

_RULE_FIELDS = tuple(field.name for field in fields(DeltaRule))
_KEPT_BYTES = 16 << 20
NO_PIECES = memoryview(bytes(24)).cast("q", (1, 3))[:0]  # [0, 3]: a sum needs no NumPy
NO_GRAMS = memoryview(bytearray(8)).cast("d", (1, 1, 1))[:0]  # [0, 1, 1]
Advance = Callable[[int], None]  # receives the number of elements done since the last call


def run(
    batch: Sequence[Segment],
    config: MergeConfig,
    files: OpenFiles,
    step: int,
    pieces: Any,
    grams: Any,
    from_base: bool,
    elements_done: array[int],
) -> None:
    """Merges one batch of segments and fills the Gram matrices of its pieces.

    Args:
        step: elements of a chunk.
        pieces: [P, 3] int64 segment, first element, elements; NO_PIECES for no Gram matrices.
        grams: [P, branches, branches] float64, filled; NO_GRAMS.
        from_base: Gram matrices are of deltas from the last input; else of the inputs.
        elements_done: [1], grows by the number of elements that are merged.
    """
    native = dispatch.native()
    builder = SourceBuilder(native, files, step)
    segments = [_segment(segment, builder) for segment in batch]
    shared = {
        "read": files.remote_read,
        "chunk_elements": step,
        "threads": config.threads,
        "allow_nonfinite": config.allow_nonfinite,
        "write_early": config.fsync,
        "written": files.written,
        "elements_done": elements_done,
    }
    sums = {"pieces": pieces, "gram": grams}
    rule = batch[0].rule
    number = None
    if isinstance(rule, DeltaRule):
        rules = [_tensor_rule(native, segment.rule) for segment in batch]
        kept_bytes = kept_chunk_bytes(config)
        result = native.merge_deltas(
            tensors=segments, rules=rules, kept_bytes=kept_bytes, **shared, **sums
        )
    elif isinstance(rule, (ElementRule, VectorRule)):
        result, number = _merge_one_by_one(native, batch, segments, shared)
    else:
        result = native.merge_sums(segments=segments, from_base=from_base, **shared, **sums)
    number = result.segment if number is None else number
    if result.nonfinite:
        rule = batch[number].rule
        if isinstance(rule, VectorRule) and rule.period:
            step = batch[number].num_elements  # columns run through the whole tensor
        raise nonfinite_error(batch[number], result.element, step, files)
    if result.error:
        files.raise_remote()
        segment = batch[number]
        where = segment.inputs[result.input].file if result.input >= 0 else "output"
        reason = os.strerror(result.error)
        raise MeritFastError(f"{where}: {reason} while merging {segment.names[0]}")


def kept_chunk_bytes(config: MergeConfig) -> int:
    """Bytes of a tensor's inputs that a method of several passes holds from one to the next."""
    return 0 if config.max_memory else _KEPT_BYTES


def _merge_one_by_one(
    native: Any, batch: Sequence[Segment], segments: Sequence[Any], shared: dict[str, Any]
) -> tuple[Any, int]:
    """The result of the last tensor that was merged, and its number: of the first that failed."""
    result: Any = None
    for number, (segment, tensor) in enumerate(zip(batch, segments, strict=True)):
        rule = segment.rule
        if isinstance(rule, VectorRule):
            result = _merge_vectors(native, tensor, rule, len(segment.inputs), shared)
        elif isinstance(rule, ElementRule):
            element_rule = native.ElementRule(**to_dict(rule))
            result = native.merge_elements(tensor=tensor, rule=element_rule, **shared)
        if result.nonfinite or result.error:
            return result, number
    return result, len(batch) - 1


def _merge_vectors(
    native: Any, tensor: Any, rule: VectorRule, num_inputs: int, shared: dict[str, Any]
) -> Any:
    branches = num_inputs - int(rule.from_base)
    failures: list[Exception] = []

    def weights(gram_address: int, vectors: int, weights_address: int) -> bool:
        grams = _array_at(gram_address, (vectors, branches, branches))
        whole = np.triu(grams) + np.swapaxes(np.triu(grams, 1), 1, 2)
        try:
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                _array_at(weights_address, (vectors, num_inputs))[:] = rule.weights(whole)
        except Exception as error:
            failures.append(error)
            return False
        return True

    result = native.merge_vectors(
        tensor=tensor,
        length=rule.length,
        period=rule.period,
        branches=branches,
        from_base=rule.from_base,
        weights=weights,
        **shared,
    )
    if failures:
        raise failures[0]
    return result


def _array_at(address: int, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Memory of C++ as an array, for the time of a call."""
    import ctypes

    memory = (ctypes.c_double * math.prod(shape)).from_address(address)
    return np.ctypeslib.as_array(memory).reshape(shape)


def _segment(segment: Segment, builder: SourceBuilder) -> Any:
    return builder.native.Segment(
        elements=segment.num_elements,
        output_fd=builder.files.output,
        output_offset=segment.output_offset,
        output_type=CODES[segment.dtype],
        inputs=[builder.source(entry) for entry in segment.inputs],
        weights=list(segment.rule) if isinstance(segment.rule, tuple) else [],
    )


def _tensor_rule(native: Any, rule: Rule) -> Any:
    assert isinstance(rule, DeltaRule)
    return native.TensorRule(**{name: getattr(rule, name) for name in _RULE_FIELDS})


@contextmanager
def watch(advance: Advance | None) -> Iterator[array[int]]:
    """Yields a [1] counter; reports its growth while C++ advances it without the GIL."""
    elements_done = array("q", [0])
    if advance is None:
        yield elements_done
        return
    stop = threading.Event()
    reported = 0

    def report() -> None:
        nonlocal reported
        now = elements_done[0]
        advance(now - reported)
        reported = now

    def report_often() -> None:
        while not stop.wait(0.1):
            report()

    thread = threading.Thread(target=report_often, daemon=True)
    thread.start()
    try:
        yield elements_done
    finally:
        stop.set()
        thread.join()
        report()
