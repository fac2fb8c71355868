"""Every container gives the same rows, by their numbers too, and broken ones give one line."""

import bz2
import csv
import gzip
import json
import lzma

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from merit_fast.data import DataConfig, DatasetConfig
from merit_fast.data.rows.reader import RowReader
from merit_fast.data.sources import (
    Source,
    count_rows,
    read_raw_rows,
    read_rows,
    source_content,
)
from merit_fast.errors import InputError
from merit_fast.manifests.hashes import checksum

ROWS = [
    {"prompt": f'{i}: Größe, "quoted"\nline', "completion": "x" * (i % 7) + "é", "id": str(i)}
    for i in range(700)
]


def lines(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows))


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def write_csv(path, delimiter):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_arrow(path, new):
    table = pyarrow.Table.from_pylist(ROWS)
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=90)


def save_dict(path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=rows, test=rows.select(range(3))).save_to_disk(str(path))


WRITERS = {
    "a.jsonl": lambda path: path.write_text(lines()),
    "a.ndjson": lambda path: path.write_bytes(b"\xef\xbb\xbf\r\n" + lines().encode()),
    "lines.json": lambda path: path.write_text(lines()),
    "array.json": lambda path: path.write_text(" \n" + json.dumps(ROWS, ensure_ascii=False)),
    "pretty.json": lambda path: path.write_text(json.dumps(ROWS, indent=3) + "\n"),
    "array.jsonl": lambda path: path.write_text("[" + lines().replace("}\n{", "}\n,{") + "]"),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines().encode())),
    "a.json.bz2": lambda path: path.write_bytes(bz2.compress(json.dumps(ROWS).encode())),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(lines().encode())),
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(lines().encode())),
    "a.csv": lambda path: write_csv(path, ","),
    "a.tsv": lambda path: write_csv(path, "\t"),
    "file.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_file),
    "stream.arrow": lambda path: write_arrow(path, pyarrow.ipc.new_stream),
    "a.parquet": write_parquet,
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(str(path), num_shards=3),
    "saved_dict": save_dict,
}


@pytest.mark.parametrize("name", WRITERS)
def test_containers_hold_equal_rows_and_numbers(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    source = Source(str(path))
    placed = list(read_rows(source))
    assert [row for _, row in placed] == ROWS
    assert len({place for place, _ in placed}) == len(ROWS)
    for numbers in ([], [0], [699], [3, 89, 90, 91, 350, 698], range(600, 640)):
        assert list(read_rows(source, numbers)) == [placed[number] for number in numbers]
    counted = name.endswith((".parquet", ".arrow")) or "saved" in name
    assert count_rows(source) == (700 if counted else None)
    for sliced, expected in [("train[10:12]", ROWS[10:12]), ("train[-1%:]", ROWS[-7:])]:
        if path.is_dir():
            assert [row for _, row in read_rows(Source(str(path), sliced))] == expected
    content = source_content(source, checksum)
    assert len(content) == (3 if name == "saved" else 1)


def test_raw_rows_of_lines_are_their_bytes(tmp_path):
    text = b'{"b": 1.50,  "a": "\\u00e9"}\r\n\n{"a":"\xc3\xa9"}'
    (tmp_path / "a.jsonl").write_bytes(text)
    assert [row for _, row in read_raw_rows(Source(str(tmp_path / "a.jsonl")))] == [
        b'{"b": 1.50,  "a": "\\u00e9"}',
        b'{"a":"\xc3\xa9"}',
    ]


def test_empty_cells_are_none_and_text_stays_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,\n"",07\n\n')
    assert list(read_rows(Source(str(path)))) == [
        (f"{path}:2", {"a": "1", "b": None}),
        (f"{path}:3", {"a": None, "b": "07"}),
    ]


def test_arrow_adds_no_keys_to_nested_rows(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "id": None},
        {"messages": [{"role": "assistant", "calls": [{"x": {"y": 1}}, {"z": 2}]}], "id": 1},
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [row for _, row in read_rows(Source(str(path)))] == rows


def test_json_columns_of_datasets_are_read_as_written(tmp_path):
    rows = [{"calls": [{"arguments": value}]} for value in ({"a": 1}, {"a": None, "b": ["c"]})]
    features = datasets.Features({"calls": [{"arguments": datasets.Json()}]})
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    saved.to_parquet(str(tmp_path / "a.parquet"))
    for name in ("saved", "a.parquet"):
        assert [row for _, row in read_rows(Source(str(tmp_path / name)))] == rows


def test_images_come_as_bytes(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    picture = {"bytes": b"\x89PNG", "path": None}
    saved = datasets.Dataset.from_list([{"image": picture}], features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    [(_, row)] = read_rows(Source(str(tmp_path / "saved")))
    assert row == {"image": {"bytes": b"\x89PNG"}}


def test_a_long_array_is_read_in_blocks(tmp_path):
    rows = [{"text": 'é\\"' * size} for size in (1, 400_000, 3, 1_500_000, 0)] * 2
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False))
    assert [row for _, row in read_rows(Source(str(path)))] == rows


BROKEN = {
    "half.jsonl": (b'{"a": 1}\n{"a": ', "half.jsonl:2: must be one JSON object: "),
    "nul.jsonl": (b'{"a": 1}\n\0\0\0', "nul.jsonl:2: must be one JSON object: "),
    "pretty_object.json": (b'{\n  "data": []\n}', "one object per line, or one array of objects"),
    "concatenated.json": (b'{"a": 1}{"a": 2}', "one object per line, or one array of objects"),
    "two.json": (b"[{}] [{}]", "two.json:1: must be part of one JSON array: expected the end"),
    "comma.json": (b"[{}\n{}]", "comma.json:2: must be part of one JSON array: expected ,"),
    "cut.json": (b'[{"a": 1}, {"a": "x', "cut.json: row 2: must be valid JSON: Unterminated"),
    "open.json": (b'[{"a": 1}', "open.json:1: must be part of one JSON array: expected ,, got the"),
    "wrong.json": (
        b'[{"a": 1},\n{"a" 1}]' + b" " * 5000,
        "row 2: must be valid JSON: Expecting ':",
    ),
    "bytes.json": (b'[{"a": "\xff"}]', "bytes.json: must be UTF-8 text, got byte 0xff near byte 8"),
    "cut.jsonl.gz": (gzip.compress(lines().encode())[:-300], "must be whole compressed data"),
    "no.jsonl.gz": (b"{}", "no.jsonl.gz: must be whole compressed data, got: Not a gzipped file"),
    "cut.jsonl.zst": (zstd(lines().encode())[:-30], "cannot be read: Truncated"),
    "cut.jsonl.xz": (lzma.compress(lines().encode())[:-30], "must be whole compressed data"),
    "cells.csv": (b"a,b\n1,2\n3\n", "cells.csv:3: must have 2 cells as the header has, got 1"),
    "twice.csv": (b"a,a\n", "twice.csv:1: the header must name a column once, got 'a' 2 times"),
    "quote.csv": (b'a\n"b\n', "quote.csv:2: must be a CSV record: unexpected end of data"),
    "latin.csv": (b"a\nb\n\xe9\n", "latin.csv: must be UTF-8 text, got byte 0xe9"),
    "no.parquet": (b"PAR1", "no.parquet: is not readable Parquet after row 0: "),
    "no.arrow": (b"ARROW1\0\0", "no.arrow: is not readable Arrow after row 0: "),
    "a.txt": (b"text", "a.txt: must hold rows with prompts and answers ("),
    "a.xlsx": (b"", "a.xlsx: must be a file of rows ("),
    "a.parquet.gz": (b"", "a.parquet.gz: must be a file of rows ("),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_give_one_line(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(read_rows(Source(str(tmp_path / name))))
    assert message in str(caught.value) and name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_csv_with_the_index_of_pandas_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(",prompt,completion\n0,a?,b\n1,c?,d\n")
    rows = [row for _, row in read_rows(Source(str(path)))]
    assert rows[1] == {"Unnamed: 0": "1", "prompt": "c?", "completion": "d"}
    reader = RowReader(DatasetConfig("d", str(path)), DataConfig())
    assert [turn.content for turn in reader.read(rows[0], "a.csv:2").messages] == ["a?", "b"]
    assert reader.notes() == ["columns not used: Unnamed: 0"]
