"""Stored examples are the examples that were written: whole, sliced, selected, chained."""

import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest

from merit_fast.data.dataset import (
    ChainedExamples,
    Dataset,
    Example,
    Tree,
    count_target_tokens,
)
from merit_fast.data.encode import EncodedRow
from merit_fast.data.store.chunk import pack_rows
from merit_fast.data.store.examples import StoredExamples
from merit_fast.data.store.files import (
    DamagedError,
    FileColumns,
    MemoryColumns,
    Summary,
    open_columns,
)
from merit_fast.errors import InputError


@dataclass(frozen=True)
class Picture:
    path: str

    @property
    def token_types(self):
        return np.zeros(3, np.int8)

    def tensors(self):
        return {}

    def reference(self):
        return {"path": self.path}


def random_example(generator, vocabulary):
    length = int(generator.integers(1, 40))
    ids = generator.integers(0, vocabulary, length).astype(np.int32)
    labels = np.where(generator.random(length) < 0.5, -100, ids).astype(np.int32)
    tree = media = None
    if generator.random() < 0.3 and length > 4:
        tree = Tree(np.array([0, 2, 3], np.int32), np.array([-1, 0, 0], np.int32))
    if generator.random() < 0.3:
        media = Picture(f"bild-{length}-ä.png")
    return Example(ids, labels, tree, media)


def rows_of(generator, vocabulary, count=40):
    rows = []
    for number in range(count):
        if number % 7 == 3:
            rows.append(EncodedRow("f:1", error=InputError(f"row {number} is bad")))
        else:
            examples = [
                random_example(generator, vocabulary) for _ in range(int(generator.integers(0, 4)))
            ]
            rows.append(EncodedRow("f:1", tuple(examples), ("truncated",) if examples else ()))
    return rows


def assert_same(found, expected):
    assert found.input_ids.dtype == found.labels.dtype == np.int32
    assert np.array_equal(found.input_ids, expected.input_ids)
    assert np.array_equal(found.labels, expected.labels)
    assert (found.tree is None) == (expected.tree is None)
    if expected.tree is not None:
        assert np.array_equal(found.tree.starts, expected.tree.starts)
        assert np.array_equal(found.tree.parents, expected.tree.parents)
    assert found.media == expected.media


def write(rows, folder, dtype, at_once):
    summary = Summary()
    if folder is None:
        sink = MemoryColumns("<u4")
        for first in range(0, len(rows), at_once):
            sink.append(pack_rows(rows[first : first + at_once], first))
        return sink.arrays()
    folder.mkdir()
    with FileColumns(folder, dtype) as sink:
        for first in range(0, len(rows), at_once):
            chunk = pack_rows(rows[first : first + at_once], first)
            summary.add(chunk)
            sink.append(chunk)
        sink.finish(summary)
    columns, read = open_columns(folder, verify=True)
    assert read == summary
    return columns


@pytest.mark.parametrize("dtype,vocabulary", [(None, 10**6), ("<u2", 2**16), ("<u4", 2**31 - 1)])
@pytest.mark.parametrize("at_once", [1, 9, 100])
def test_examples_come_back_as_they_were(tmp_path, dtype, vocabulary, at_once):
    rows = rows_of(np.random.default_rng(at_once), vocabulary)
    expected = [example for row in rows for example in row.examples]
    columns = write(rows, dtype and tmp_path / "store", dtype, at_once)
    found = StoredExamples(columns, lambda reference: Picture(reference["path"]))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert_same(found[-1], expected[-1])
    for index in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            found[index]
    for part in (slice(2, 5), slice(None, None, -3), slice(9, 2)):
        for one, other in zip(found[part], expected[part], strict=True):
            assert_same(one, other)
    numbers = [i for i, row in enumerate(rows) for _ in row.examples]
    assert found.rows.tolist() == numbers
    twice = found.select([5, 1, 5]).select(np.array([2, 1]))
    for one, other in zip(twice, (expected[5], expected[1]), strict=True):
        assert_same(one, other)
    stored, plain = Dataset("d", found), Dataset("d", tuple(expected))
    text = [i for i, e in enumerate(expected) if e.tree is None and e.media is None]
    assert stored.select(text).is_plain and plain.select(text).is_plain and not stored.is_plain
    chosen = np.random.default_rng(0).permutation(len(expected))[:11]
    for one, other in ((stored, plain), (stored.select(chosen), plain.select(chosen))):
        assert one.lengths.tolist() == other.lengths.tolist()
        assert one.num_tokens == other.num_tokens == sum(len(e.input_ids) for e in other.examples)
        assert one.num_target_tokens == other.num_target_tokens
        counts = [count_target_tokens(example.labels) for example in other.examples]
        assert one.is_plain == other.is_plain
        assert one.target_counts.tolist() == other.target_counts.tolist() == counts


def test_a_store_is_written_without_its_tokens_and_images_in_memory(tmp_path):
    ids = np.arange(50_000, dtype=np.int32)
    example = Example(ids, ids, media=Picture("x" * 500_000))
    chunk = pack_rows([EncodedRow("f:1", (example,))], 0)
    tracemalloc.start()
    with FileColumns(tmp_path, "<u4") as sink:
        for _ in range(40):
            sink.append(chunk)
        sink.finish(Summary(num_rows=40))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3e6  # of 28 MB
    columns, _ = open_columns(tmp_path, verify=True)
    found = StoredExamples(columns, lambda reference: Picture(reference["path"]))
    assert_same(found[39], example)


def test_names_that_are_no_unicode_are_kept(tmp_path):
    with FileColumns(tmp_path, "<u2") as sink:
        sink.finish(Summary(errors=["b\udce4d.jsonl:3: is bad"], notes=["ä"]))
    _, summary = open_columns(tmp_path)
    assert summary.errors == ["b\udce4d.jsonl:3: is bad"] and summary.notes == ["ä"]


def test_a_changed_image_is_refused(tmp_path):
    ids = np.arange(5, dtype=np.int32)
    write([EncodedRow("f:1", (Example(ids, ids, media=Picture("a")),))], tmp_path / "s", "<u2", 1)
    file = tmp_path / "s" / "media.bin"
    file.write_bytes(file.read_bytes().replace(b"a", b"b", 1))
    columns, _ = open_columns(tmp_path / "s")
    with pytest.raises(InputError, match="example 0: must have the checksum of its index"):
        StoredExamples(columns, lambda reference: Picture(reference["path"]))[0]
    with pytest.raises(DamagedError, match="media.bin: its checksum is another one"):
        open_columns(tmp_path / "s", verify=True)


def test_chained_examples_are_those_of_the_datasets_in_turn():
    generator = np.random.default_rng(3)
    sizes = (4, 0, 1, 7)
    datasets = [
        Dataset(str(n), tuple(random_example(generator, 50) for _ in range(n))) for n in sizes
    ]
    expected = [example for dataset in datasets for example in dataset.examples]
    found = ChainedExamples(datasets)
    assert list(found) == expected and found[-12] is expected[0] and found[3:6] == expected[3:6]
    assert found.lengths.tolist() == [len(example.input_ids) for example in expected]
    with pytest.raises(IndexError):
        found[12]
    assert len(ChainedExamples([])) == 0 and ChainedExamples([]).lengths.tolist() == []


def test_a_label_that_is_not_its_token_is_no_example():
    row = EncodedRow("f:1", (Example(np.array([1, 2]), np.array([-100, 3])),))
    with pytest.raises(ValueError, match="every label in the loss must be the token"):
        pack_rows([row], 0)


def _cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file):
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "name,damage,verify",
    [
        ("tokens.bin", _cut, False),
        ("index.bin", lambda file: file.unlink(), False),
        ("index.bin", _flip, False),
        ("tokens.bin", _flip, True),
        ("meta.json", _cut, False),
        ("meta.json", lambda file: file.write_text('{"version": 0}'), False),
        ("meta.json", lambda file: file.write_text('{"version": 1, "columns": {}}'), False),
    ],
)
def test_a_damaged_store_does_not_open(tmp_path, name, damage, verify):
    write(rows_of(np.random.default_rng(0), 99), tmp_path / "store", "<u2", 9)
    text = (tmp_path / "store" / name).read_text(errors="replace")
    damage(tmp_path / "store" / name)
    if name == "meta.json" and damage is _cut:
        (tmp_path / "store" / name).write_text(text[: len(text) // 2])
    with pytest.raises(DamagedError, match=r"store"):
        open_columns(tmp_path / "store", verify=verify)
