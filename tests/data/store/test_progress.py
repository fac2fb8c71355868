"""The display of rows as they are tokenized: one for all datasets, none for few rows."""

import io

import pytest
from support.data.rows import make_tokenizer, write

from merit_fast.data import DataConfig, DatasetConfig, load_mixture
from merit_fast.data.store import TokenStore
from merit_fast.progress import PlainProgress


@pytest.fixture
def mixture(tmp_path):
    rows = [{"prompt": f"{i}?", "completion": "yes"} for i in range(450)]
    files = {name: write(tmp_path / f"{name}.jsonl", rows) for name in "abc"}
    return [DatasetConfig(name, path) for name, path in files.items()]


def lines_of(mixture, store=None):
    stream = io.StringIO()
    load_mixture(
        mixture,
        make_tokenizer(),
        DataConfig(duplicates="keep"),
        part="train",
        store=store,
        progress=PlainProgress(stream),
        num_workers=0,
    )
    return [line for line in stream.getvalue().splitlines() if line.startswith("tokenize")]


def test_many_small_datasets_have_one_display(mixture):
    *_, last = lines_of(mixture)
    assert last.startswith("tokenize (train): 1.35 k rows in")


def test_few_rows_are_not_shown(mixture):
    assert lines_of(mixture[:2]) == []


def test_rows_in_the_store_are_not_shown_again(mixture, tmp_path):
    store = TokenStore(tmp_path / "s", {name: name for name in "abc"})
    assert lines_of(mixture[:1], store) == []
    *_, last = lines_of(mixture, store)
    assert "tokenize (train): " in last
    assert lines_of(mixture, store) == []
