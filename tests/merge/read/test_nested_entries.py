"""Entries of every form, nested at random: what the engine reads, against NumPy's own indexing."""

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.entries import RandomEntries

from merit_fast.kernels import dispatch
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.compiled import native
from merit_fast.merge.engine.compiled.sources import SourceBuilder, scratch_bytes, wide_bytes
from merit_fast.merge.engine.opened import open_files
from merit_fast.merge.engine.plan import Segment
from merit_fast.merge.engine.values import values
from merit_fast.merge.read.entries import (
    AssembledEntry,
    Part,
    TensorEntry,
    stored_entries,
    value_dtype,
)

needs_native = pytest.mark.skipif(
    dispatch.native_module() is None, reason="needs the native module"
)
NOTHING = (np.empty((0, 3), np.int64), np.empty((0, 0, 0)), False, np.zeros(1, np.int64))


def read_native(entry: TensorEntry, step: int, threads: int) -> np.ndarray:
    """The engine's values of an entry in float64, read in chunks of ``step`` elements."""
    out = np.full(entry.num_elements, np.nan)
    segment = Segment(
        (entry.name,), (entry.num_elements,), "F64", out.ctypes.data, (entry,), (1.0,)
    )
    config = replace(MergeConfig(), threads=threads)
    with open_files({stored.file for stored in stored_entries(entry)}, None) as files:
        native.run([segment], config, files, step, *NOTHING)
    return out


@pytest.mark.parametrize("seed", range(60))
def test_numpy_gives_the_values_of_nested_entries(tmp_path: Path, seed: int) -> None:
    known = RandomEntries(tmp_path, seed).any(3)
    flat = known.values.ravel()
    with open_files({stored.file for stored in stored_entries(known.entry)}, None) as files:
        for first in range(0, flat.size, 7):
            count = min(7, flat.size - first)
            got, dtype = values(known.entry, first, count, files)
            numbers = (got.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else got
            np.testing.assert_allclose(numbers, flat[first : first + count], 1e-12, 1e-13)


@needs_native
@pytest.mark.parametrize("seed", range(150))
def test_the_engine_has_the_bits_of_numpy_for_any_chunk_size(tmp_path: Path, seed: int) -> None:
    known = RandomEntries(tmp_path, seed).any(3)
    whole = read_native(known.entry, known.entry.num_elements, 1)
    np.testing.assert_allclose(whole.reshape(known.values.shape), known.values, 1e-12, 1e-13)
    for step in (1, 2, 3, 7, 16, 64):
        assert read_native(known.entry, step, 1 + step % 3).tobytes() == whole.tobytes(), step


@needs_native
@pytest.mark.parametrize("seed", range(40))
def test_a_source_works_in_the_memory_that_the_plan_counts(tmp_path: Path, seed: int) -> None:
    entry = RandomEntries(tmp_path, seed).any(3)
    elements = 1 << 12
    module = dispatch.native()
    with open_files({stored.file for stored in stored_entries(entry.entry)}, None) as files:
        source = SourceBuilder(module, files).source(entry.entry)
        used = module.scratch_bytes(source=source, elements=elements)
    counted = scratch_bytes(entry.entry) * elements
    assert counted == used or (counted < used <= counted + 1024)


@needs_native
@pytest.mark.parametrize("shape", [(24, 3000), (3, 8, 1100), (1, 5000)])
@pytest.mark.parametrize("codes", [False, True])
def test_transposed_tensors_are_read_in_runs_that_workers_share(
    tmp_path: Path, shape: tuple[int, ...], codes: bool
) -> None:
    """Rows longer than what a reader skips, so that every element lies in a run of its own."""
    make = RandomEntries(tmp_path, len(shape))
    rows = (math.prod(shape[:-1]), shape[-1])
    known = make.decoded(rows) if codes else make.plain(rows, "F32")
    turned = (*shape[:-2], shape[-1], shape[-2])
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    strides[-2:] = strides[:-3:-1]
    part = Part(known.entry, (0,) * len(shape), turned, 0, tuple(strides))
    dtype = value_dtype(known.entry)
    num_bytes = known.entry.num_bytes
    entry = AssembledEntry("turned", dtype, turned, known.entry.file, 0, num_bytes, (part,))
    expected = known.values.reshape(shape).swapaxes(-1, -2).ravel()
    for step, threads in ((64, 3), (1000, 2), (expected.size, 1)):
        np.testing.assert_array_equal(read_native(entry, step, threads), expected)
    kept = 16 * (8 if codes else 4) if shape[-2] > 1 else 0
    assert wide_bytes(entry) == kept and wide_bytes(known.entry) == 0


@needs_native
def test_a_vocabulary_of_single_rows_in_any_order_is_read_fast(tmp_path: Path) -> None:
    """150,000 boxes; a reader that looks at all of them for each chunk takes minutes."""
    rows = 150_000
    width = 2
    rng = np.random.default_rng(0)
    order = rng.permutation(rows)
    values = rng.standard_normal((rows, width)).astype(np.float32)
    file = tmp_path / "rows.bin"
    file.write_bytes(values.tobytes())
    source = TensorEntry("embedding", "F32", (rows, width), file, 0, values.nbytes)
    parts = tuple(
        Part(source, (row, 0), (1, width), int(old) * width, (width, 1))
        for row, old in enumerate(order)
    )
    entry = AssembledEntry("rows", "F32", (rows, width), file, 0, values.nbytes, parts)
    start = time.process_time()
    got = read_native(entry, 64, 2)
    assert time.process_time() - start < 10
    np.testing.assert_array_equal(got.reshape(rows, width), values[order])


@needs_native
@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ([(0, 0, 3)], "must fill their tensor once"),
        ([(0, 0, 3), (3, 2, 2)], "reads outside of t0"),
        ([(0, 0, 3), (2, 0, 3)], "must fill their tensor once"),
        ([(0, 0, 3), (4, 0, 2)], "lies outside of its tensor"),
    ],
)
def test_boxes_that_leave_a_hole_or_leave_their_tensor_are_refused(
    tmp_path: Path, parts: list[tuple[int, int, int]], rule: str
) -> None:
    source = RandomEntries(tmp_path, 0).plain((3,), "F32").entry
    boxes = tuple(Part(source, (at,), (size,), start, (1,)) for at, start, size in parts)
    entry = AssembledEntry("whole", "F32", (5,), source.file, 0, 20, boxes)
    with pytest.raises(ValueError, match=rule):
        read_native(entry, 5, 1)
