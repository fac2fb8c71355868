"""Held-out rows by share: chosen by content, on one side each, part of the fingerprint."""

import pytest
from support.data.rows import load, make_tokenizer, targets, write

from merit_fast.data import DataConfig, DatasetConfig, mixture_fingerprint
from merit_fast.errors import InputError
from merit_fast.options.parser import parse, to_plain

ROWS = [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def answers(path, tokenizer, part, **keys):
    dataset = load(path, tokenizer, part=part, **keys)
    return [targets(tokenizer, example)[0] for example in dataset.examples]


def test_a_share_is_held_out_by_content(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ROWS)
    whole = answers(path, tokenizer, "train")
    train = answers(path, tokenizer, "train", eval_share=0.2)
    held_out = answers(path, tokenizer, "eval", eval_share=0.2)
    assert sorted(train + held_out) == sorted(whole) and not set(train) & set(held_out)
    assert 20 <= len(held_out) <= 60
    assert answers(path, tokenizer, "train", eval_share=0.2, max_examples=5) == train[:5]
    # order and other rows move none: half of the rows, twice and backwards
    other = write(tmp_path / "b.parquet", ROWS[:100][::-1] * 2)
    expected = [answer for answer in held_out if answer in whole[:100]]
    assert answers(other, tokenizer, "eval", eval_share=0.2) == expected[::-1] * 2


def test_a_share_belongs_to_the_fingerprint(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)

    def of(part, **keys):
        return mixture_fingerprint([DatasetConfig("a", path, **keys)], DataConfig(), "m", part=part)

    fingerprints = [of(part, eval_share=f) for part in ("train", "eval") for f in (0.1, 0.2)]
    assert len({of("train"), of("eval"), *fingerprints}) == 6
    assert "eval_share" not in to_plain(DatasetConfig("a", path))


@pytest.mark.parametrize(
    "keys,message",
    [
        ({"eval_share": 1}, "eval_share: must be between 0 and 1, got 1.0"),
        (
            {"eval_share": 0.1, "eval_path": "b"},
            "eval_share: must be absent next to eval_path or eval_split, got 0.1",
        ),
    ],
)
def test_rules_of_the_share(keys, message):
    with pytest.raises(InputError, match=message):
        parse(DatasetConfig, {"name": "a", "path": "a.jsonl", **keys}, "m.yml")


def test_a_share_that_leaves_a_side_empty_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ROWS[:3])
    rule = "d: eval_share: must leave rows on both sides, got 1e-06, which leaves none of 3 rows"
    with pytest.raises(InputError, match=rule):
        load(path, tokenizer, part="eval", eval_share=1e-6)
