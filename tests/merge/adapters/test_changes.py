"""Every form of change, on runs of elements that cut rows, against its formula in NumPy."""

from pathlib import Path

import numpy as np
import pytest

from merit_fast.kernels import dispatch
from merit_fast.merge.engine.compiled.sources import SourceBuilder
from merit_fast.merge.engine.opened import open_files
from merit_fast.merge.engine.values import values
from merit_fast.merge.read.entries import (
    Added,
    Change,
    ChangedEntry,
    ExpertsLowRank,
    LowRank,
    Magnitude,
    Rows,
    TensorEntry,
    stored_entries,
)

Array = np.ndarray


def stored(folder: Path, *shape: int) -> tuple[TensorEntry, Array]:
    """A float32 tensor in a file of its own, and its values in float64."""
    name = f"t{len(list(folder.iterdir()))}"
    array = np.random.default_rng(len(name) + len(list(folder.iterdir()))).standard_normal(shape)
    array = array.astype(np.float32)
    (folder / name).write_bytes(array.tobytes())
    entry = TensorEntry(name, "F32", shape, folder / name, 0, array.nbytes)
    return entry, array.astype(np.float64)


def check(base: TensorEntry, changes: tuple[Change, ...], expected: Array) -> None:
    """Compares runs of both engines with the expected array."""
    entry = ChangedEntry(
        base.name, base.dtype, base.shape, base.file, 0, base.num_bytes, base, changes
    )
    flat = expected.ravel()
    files = {each.file for each in stored_entries(entry)}
    assert {change_entry.file for change in changes for change_entry in change.stored} < files
    native = dispatch.native()
    with open_files(files, None) as opened:
        source = SourceBuilder(native, opened)
        built = source.source(entry)
        for first in range(0, flat.size, 3):
            for count in (1, 4, flat.size - first):
                count = min(count, flat.size - first)
                run = flat[first : first + count]
                got, dtype = values(entry, first, count, opened)
                assert dtype == "F64"
                np.testing.assert_allclose(got, run, rtol=1e-6, atol=1e-12)
                out = np.empty(count)
                assert not native.read_values(source=built, read=None, first=first, out=out)
                np.testing.assert_allclose(out, got, rtol=1e-14, atol=1e-15)


def test_a_convolutions_product(tmp_path: Path) -> None:
    base, w = stored(tmp_path, 5, 3, 2, 2)
    (a, a_values), (b, b_values) = stored(tmp_path, 2, 3, 2, 2), stored(tmp_path, 5, 2, 1, 1)
    change = LowRank("w", a, b, 1.5, False)
    assert change.shape == base.shape
    delta = np.einsum("or,rijk->oijk", b_values[:, :, 0, 0], a_values)
    check(base, (change,), w + 1.5 * delta)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_products(tmp_path: Path, transposed: bool) -> None:
    experts = 3
    out = 4
    into = 5
    rank = 2
    base, w = stored(tmp_path, experts, *((into, out) if transposed else (out, into)))
    a, a_values = stored(tmp_path, experts * rank, into)
    b, b_values = stored(tmp_path, out, rank * experts)
    change = ExpertsLowRank(a, b, 0.7, experts, transposed)
    assert change.shape == base.shape
    letters = "eio" if transposed else "eoi"
    delta = np.einsum(
        f"ore,eri->{letters}",
        b_values.reshape(out, rank, experts),
        a_values.reshape(experts, rank, into),
    )
    check(base, (change,), w + 0.7 * delta)


@pytest.mark.parametrize("by_column", [False, True])
def test_lengths_after_a_product(tmp_path: Path, by_column: bool) -> None:
    base, w = stored(tmp_path, 4, 7)
    out, into = (7, 4) if by_column else (4, 7)
    (a, a_values), (b, b_values) = stored(tmp_path, 2, into), stored(tmp_path, out, 2)
    lengths, m = stored(tmp_path, 1, out)
    delta = b_values @ a_values
    w = w + (delta.T if by_column else delta)
    norm = np.linalg.norm(w, axis=0 if by_column else 1)
    factor = m.ravel() / norm
    expected = w * (factor[None, :] if by_column else factor[:, None])
    check(base, (LowRank("w", a, b, 1.0, by_column), Magnitude(lengths, by_column)), expected)


def test_lengths_of_a_convolution(tmp_path: Path) -> None:
    base, w = stored(tmp_path, 4, 3, 2)
    lengths, m = stored(tmp_path, 1, 4, 1)
    factor = m.ravel() / np.linalg.norm(w.reshape(4, -1), axis=1)
    check(base, (Magnitude(lengths, False),), w * factor[:, None, None])


def test_new_rows_in_any_order(tmp_path: Path) -> None:
    base, w = stored(tmp_path, 6, 5)
    rows, new = stored(tmp_path, 3, 5)
    expected = w.copy()
    expected[[5, 0, 3]] = new
    check(base, (Rows(rows, (5, 0, 3)),), expected)


def test_an_added_bias(tmp_path: Path) -> None:
    base, w = stored(tmp_path, 9)
    vector, b = stored(tmp_path, 9)
    check(base, (Added(vector, 0.3),), w + 0.3 * b)


def test_changes_come_in_their_order(tmp_path: Path) -> None:
    base, w = stored(tmp_path, 4, 3)
    rows, new = stored(tmp_path, 1, 3)
    vector, b = stored(tmp_path, 4, 3)
    expected = w.copy()
    expected[2] = new
    check(base, (Rows(rows, (2,)), Added(vector, 2.0)), expected + 2.0 * b)
