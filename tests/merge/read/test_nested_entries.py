"""Entries of every form, nested at random: what the engine reads, against NumPy's own indexing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.merge.entries import RandomEntries

from merit_fast.kernels import dispatch
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine import native
from merit_fast.merge.engine.opened import open_files
from merit_fast.merge.engine.plan import Segment
from merit_fast.merge.engine.values import values
from merit_fast.merge.read.entries import TensorEntry, stored_entries

needs_native = pytest.mark.skipif(
    dispatch.native_module() is None, reason="needs the native module"
)
NOTHING = (np.empty((0, 3), np.int64), np.empty((0, 0, 0)), False, lambda count: None)


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
