"""A tokenizer and a mixture of two files for the tests of token stores."""

import pytest
from support.data.rows import make_tokenizer, write
from support.data.stores import LONG

from merit_fast.data import DatasetConfig


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def mixture(tmp_path):
    a = [{"prompt": f"{i}?", "completion": f"{i} " * (i % 5 + 1)} for i in range(300)]
    b = [{"prompt": "x", "completion": "y", "more": 1}, LONG]
    return [
        DatasetConfig("a", write(tmp_path / "a.jsonl", a)),
        DatasetConfig("b", write(tmp_path / "b.jsonl", b)),
    ]
