"""Rows in S3: folders, globs, Parquet by row group; and a store without its client."""

import sys

import pytest
from support.data.rows import write
from support.merge.s3_server import s3_server_or_skip

from merit_fast.data.sources import Source, files_of, read_rows, source_content
from merit_fast.errors import InputError
from merit_fast.manifests.hashes import checksum

ROWS = [{"prompt": str(i), "completion": "x" * 2000} for i in range(40)]


@pytest.fixture(scope="module")
def server():
    yield from s3_server_or_skip()


@pytest.fixture(scope="module")
def bucket(server, tmp_path_factory):
    import fsspec

    store = fsspec.filesystem("s3")
    store.mkdir("rows-of-tests")
    folder = tmp_path_factory.mktemp("rows")
    for name, rows in {"train.parquet": ROWS, "test.jsonl": ROWS[:3]}.items():
        store.put_file(write(folder / name, rows), f"rows-of-tests/set/{name}")
    return "s3://rows-of-tests"


def test_folders_and_globs_of_a_bucket(bucket):
    assert files_of(Source(f"{bucket}/set")) == [f"{bucket}/set/train.parquet"]
    assert [row for _, row in read_rows(Source(f"{bucket}/set"))] == ROWS
    assert [row for _, row in read_rows(Source(f"{bucket}/set", "test"))] == ROWS[:3]
    assert files_of(Source(f"{bucket}/*/*.jsonl", "test")) == [f"{bucket}/set/test.jsonl"]
    [(url, *marks)] = source_content(Source(f"{bucket}/set/test.jsonl"), checksum)
    assert url == f"{bucket}/set/test.jsonl" and any("ETag" in mark for mark in marks)
    with pytest.raises(InputError, match="is neither a file nor a folder in its store"):
        files_of(Source(f"{bucket}/none"))


def test_few_rows_of_a_parquet_file_are_few_bytes(server, bucket):
    source = Source(f"{bucket}/set/train.parquet")
    before = len(server.requests)
    assert [row for _, row in read_rows(source, [4])] == [ROWS[4]]
    answered = server.requests[before:]
    assert any(request.range for request in answered if request.method == "GET")


def test_a_store_without_its_client_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError) as caught:
        files_of(Source("gs://bucket/rows.jsonl"))
    message = str(caught.value)
    assert message.startswith("gs://bucket/rows.jsonl: needs a client of its store: ")
    assert "\n" not in message and "gcsfs" in message.lower()
