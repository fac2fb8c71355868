"""Values of tensors that lie in boxes of other tensors, against NumPy's own indexing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from merit_fast.merge.engine.opened import open_files
from merit_fast.merge.engine.values import values
from merit_fast.merge.read.entries import AssembledEntry, Part, TensorEntry, stored_entries


def stored(file: Path, array: np.ndarray) -> TensorEntry:
    """A tensor that fills a file."""
    file.write_bytes(array.tobytes())
    return TensorEntry(file.stem, "F32", array.shape, file, 0, array.nbytes)


def assembled(shape: Sequence[int], *parts: Part) -> AssembledEntry:
    first = parts[0].source
    read = sum(part.source.num_bytes for part in parts)
    return AssembledEntry("whole", "F32", tuple(shape), first.file, 0, read, tuple(parts))


def check(entry: AssembledEntry, expected: np.ndarray) -> None:
    """Every run of elements equals the same run of the expected array."""
    flat = expected.ravel()
    files = {each.file for each in stored_entries(entry)}
    with open_files(files, None) as opened:
        for first in range(flat.size):
            for count in (1, 3, flat.size - first):
                count = min(count, flat.size - first)
                got, dtype = values(entry, first, count, opened)
                assert dtype == "F32"
                np.testing.assert_array_equal(got, flat[first : first + count])


@pytest.fixture
def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.standard_normal((3, 4)).astype(np.float32) for _ in range(2)]


def test_experts_stack_and_gate_stands_over_up(tmp_path: Path, arrays: list[np.ndarray]) -> None:
    gate, up = (stored(tmp_path / f"{k}.bin", array) for k, array in enumerate(arrays))
    parts = [
        Part(source, (expert, 3 * half, 0), (1, 3, 4), 0, (0, 4, 1))
        for expert in range(2)
        for half, source in enumerate((gate, up))
    ]
    fused = np.concatenate(arrays)
    check(assembled((2, 6, 4), *parts), np.stack([fused, fused]))


def test_columns_stand_next_to_each_other(tmp_path: Path, arrays: list[np.ndarray]) -> None:
    left, right = (stored(tmp_path / f"{k}.bin", array) for k, array in enumerate(arrays))
    parts = [Part(left, (0, 0), (3, 4), 0, (4, 1)), Part(right, (0, 4), (3, 4), 0, (4, 1))]
    check(assembled((3, 8), *parts), np.concatenate(arrays, axis=1))


def test_a_transposed_slice_and_interleaved_rows(tmp_path: Path, arrays: list[np.ndarray]) -> None:
    a, b = (stored(tmp_path / f"{k}.bin", array) for k, array in enumerate(arrays))
    check(assembled((4, 2), Part(a, (0, 0), (4, 2), 4, (1, 4))), arrays[0][1:].T)
    rows = np.empty((6, 4), np.float32)
    rows[::2], rows[1::2] = arrays
    parts = [Part(each, (k, 0), (3, 4), 0, (4, 1), (2, 1)) for k, each in enumerate((a, b))]
    check(assembled((6, 4), *parts), rows)
