"""The rows of a part: sample, weight, shares, duplicates, leaks and wrong rows, without tokens."""

import json

import numpy as np
import pytest
from support.data.rows import write

from merit_fast.data import DataConfig, DatasetConfig, dataset_fingerprints
from merit_fast.data.mixture.scan import cached_scan, scan_source
from merit_fast.data.mixture.select import MixtureRows, ScanCache
from merit_fast.data.sources import Source
from merit_fast.errors import InputError

ROWS = [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(200)]


def chat(row):
    turns = [("human", row["prompt"]), ("gpt", row["completion"])]
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows") / "a.jsonl", ROWS)


def select(*configs, part="train", **data):
    return MixtureRows(configs, DataConfig(**data)).select(part)


def one(path, part="train", data=None, **keys):
    return select(DatasetConfig("d", str(path), **keys), part=part, **(data or {}))["d"]


def trained(selection):
    """The numbers of the part's rows in order, with repeats."""
    return selection.rows[selection.order].tolist()


def test_a_plain_dataset_is_all_rows_in_order(path):
    plain = one(path)
    assert trained(plain) == list(range(200)) and plain.notes == plain.errors == ()
    assert trained(one(path, max_examples=5)) == list(range(5))
    assert len(np.unique(plain.keys)) == 200


def test_a_sample_is_random_and_follows_seed_and_content(path, tmp_path):
    sample = trained(one(path, sample=40))
    assert sample == sorted(set(sample)) and len(sample) == 40
    assert sample[-1] > 100, "not the first rows of the file"
    assert sample == trained(one(path, sample=40))
    assert sample != trained(one(path, sample=40, data={"seed": 1}))
    # the same conversations in another order, format and file, and under another name
    other = write(tmp_path / "b.parquet", [chat(row) for row in ROWS[::-1]])
    assert sorted(199 - i for i in trained(one(other, sample=40))) == sample
    assert max(trained(one(path, sample=10, max_examples=20))) < 20
    with pytest.raises(InputError, match="d: sample: must be at most the 200 training rows, got"):
        one(path, sample=201)


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0, 2.0, 2.5])
def test_a_weight_is_the_times_that_a_row_is_seen(path, weight):
    seen = trained(one(path, weight=weight))
    assert len(seen) == round(200 * weight) and seen == sorted(seen)
    counts = np.bincount(seen, minlength=200)
    assert set(counts) == {int(weight), -int(-weight // 1)}
    held_out = one(path, "eval", weight=weight, eval_share=0.3)
    assert trained(held_out) == held_out.rows.tolist(), "held-out rows are seen once"


def test_a_weight_that_leaves_nothing_is_refused(path):
    with pytest.raises(InputError, match="d: weight: must leave at least one of 200 training rows"):
        one(path, weight=0.001)


def test_shares_divide_conversations_whatever_their_format(path, tmp_path):
    held_out = one(path, "eval", eval_share=0.2)
    train = one(path, eval_share=0.2)
    assert sorted([*trained(held_out), *trained(train)]) == list(range(200))
    other = write(tmp_path / "b.jsonl", [chat(row) for row in ROWS] * 2)
    again = trained(one(other, "eval", eval_share=0.2))
    assert again == [*trained(held_out), *(200 + i for i in trained(held_out))]


def test_duplicates_are_counted_or_dropped(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROWS[0], ROWS[1], ROWS[0], ROWS[0]])
    kept = one(path)
    assert trained(kept) == [0, 1, 2, 3] and "2 rows equal to an earlier row" in kept.notes[0]
    dropped = one(path, data={"duplicates": "drop"})
    assert trained(dropped) == [0, 1] and "2 rows dropped" in dropped.notes[0]


def leaking(tmp_path):
    """Dataset a trains two rows that b holds out, in another format."""
    a = write(tmp_path / "a.jsonl", ROWS[:10])
    b = write(tmp_path / "b.jsonl", ROWS[50:60])
    held_out = write(tmp_path / "b.eval.jsonl", [chat(ROWS[i]) for i in (3, 100, 7)])
    return DatasetConfig("a", a), DatasetConfig("b", b, eval_path=held_out)


def test_leaks_are_found_across_the_mixture(tmp_path):
    configs = leaking(tmp_path)
    with pytest.raises(InputError) as caught:
        select(*configs)
    assert str(caught.value) == (
        f"mixture: a: training rows must not be held out too, got {tmp_path}/a.jsonl:4 and 1 more; "
        f"b holds out {tmp_path}/b.eval.jsonl:1 (data.leaks: drop takes them out of the training)"
    )
    dropped = select(*configs, leaks="drop")["a"]
    assert trained(dropped) == [0, 1, 2, 4, 5, 6, 8, 9] and dropped.num_leaks == 2
    kept = select(*configs, leaks="keep")["a"]
    assert trained(kept) == list(range(10)) and kept.num_leaks == 2
    assert "2 rows held out too" in kept.notes[0]
    assert trained(select(*configs, part="eval", leaks="drop")["b"]) == [0, 1, 2]
    only_first = DatasetConfig("a", configs[0].path, max_examples=3)
    assert trained(select(only_first, configs[1])["a"]) == [0, 1, 2], "rows that no run trains"


def test_drop_leaves_as_many_rows_as_asked_for(tmp_path):
    a, b = leaking(tmp_path)
    few = DatasetConfig("a", a.path, max_examples=5)
    assert trained(select(few, b, leaks="drop")["a"]) == [0, 1, 2, 4, 5]
    every = DatasetConfig("a", write(tmp_path / "c.jsonl", [ROWS[3], ROWS[7]]))
    with pytest.raises(InputError, match="a: data.leaks: must leave training rows, all 2 are"):
        select(every, b, leaks="drop")


def test_a_prompt_with_another_answer_is_noted(tmp_path):
    a = write(tmp_path / "a.jsonl", [{**ROWS[0], "completion": "other"}, ROWS[1]])
    b = write(tmp_path / "b.jsonl", ROWS[:1])
    selection = one(a, eval_path=b)
    assert selection.notes == ("1 row with the prompt of a held-out row and another answer",)
    assert selection.num_leaks == 0


def write_images(folder, contents):
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return str(folder)


def test_images_are_known_by_their_content_not_by_their_path(tmp_path):
    big = bytes(range(256)) * 64
    first = write_images(tmp_path / "first", {"0.png": big + b"a", "1.png": big + b"b"})
    second = write_images(tmp_path / "second", {"0.png": big + b"c", "other.png": big + b"a"})

    def rows(*names):
        return [{"prompt": "<image>?", "completion": "a cat", "image": name} for name in names]

    a = DatasetConfig("a", write(tmp_path / "a.jsonl", rows("0.png", "1.png")), media=first)
    path = write(tmp_path / "b.jsonl", rows("0.png"))
    b = DatasetConfig("b", write(tmp_path / "c.jsonl", rows("1.png")), path, media=second)
    assert select(a, b)["a"].num_leaks == 0, "equal names in two folders are two images"
    path = write(tmp_path / "d.jsonl", rows("other.png"))
    b = DatasetConfig("b", write(tmp_path / "e.jsonl", rows("0.png")), path, media=second)
    with pytest.raises(InputError, match="a.jsonl:1; b holds out"):
        select(a, b)


def test_rows_that_a_column_leaves_out_are_counted(tmp_path):
    rows = [{**row, "label": i % 4 == 0} for i, row in enumerate(ROWS[:20])]
    selection = one(write(tmp_path / "a.jsonl", rows), columns={"keep_if": "label"})
    assert trained(selection) == [0, 4, 8, 12, 16]
    assert selection.notes == ("15 rows left out by keep_if",)


def test_wrong_rows_are_skipped_up_to_a_number(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in ROWS[:4]]
    path.write_text("\n".join([lines[0], "{broken", lines[1], '{"prompt": "x"}', lines[2]]))
    selection = one(path, data={"bad_rows": 2})
    assert trained(selection) == [0, 2, 4]
    assert [error.split(": ")[0] for error in selection.errors] == [f"{path}:2", f"{path}:4"]
    with pytest.raises(InputError, match="a.jsonl:2: must be one JSON object"):
        one(path)
    with pytest.raises(InputError, match="d: must have at most data.bad_rows = 1 wrong rows"):
        one(path, data={"bad_rows": 1})


def test_a_scan_is_kept_and_made_again_where_it_is_damaged(tmp_path, path):
    made = []

    def make():
        made.append(1)
        return scan_source(Source(path), DatasetConfig("d", path), DataConfig())

    first = cached_scan(tmp_path, "f", make)
    again = cached_scan(tmp_path, "f", make)
    assert len(made) == 1
    assert np.array_equal(first.keys, again.keys) and np.array_equal(first.rows, again.rows)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    third = cached_scan(tmp_path, "f", make)
    assert len(made) == 2 and np.array_equal(first.prompts, third.prompts)


def test_the_rows_of_a_cache_are_those_of_the_files(tmp_path, path):
    cache = ScanCache(tmp_path / "scans", lambda config, place: place.path)
    config = DatasetConfig("d", path, sample=20, eval_share=0.1)
    selections = [MixtureRows([config], DataConfig(), cache).select("train")["d"] for _ in "ab"]
    assert (
        trained(selections[0])
        == trained(selections[1])
        == trained(one(path, sample=20, eval_share=0.1))
    )


@pytest.mark.parametrize(
    ("keys", "data"),
    [
        ({"sample": 20}, {}),
        ({"weight": 2.0}, {}),
        ({"columns": {"prompt": "prompt"}}, {}),
        ({"train_on": "last"}, {}),
        ({"roles": {"user": ("asker",)}}, {}),
        ({}, {"train_on": "last"}),
        ({}, {"date": "2025-01-01"}),
        ({}, {"template_arguments": {"enable_thinking": False}}),
        ({}, {"special_tokens_in_text": "keep"}),
        ({}, {"duplicates": "drop"}),
        ({}, {"leaks": "drop"}),
    ],
)
def test_the_fingerprint_covers_what_changes_examples(path, keys, data):
    held_out = {"eval_share": 0.1}
    plain = fingerprint_of(path, held_out, {})
    assert fingerprint_of(path, {**held_out, **keys}, data) != plain
    assert fingerprint_of(path, held_out, {"leaks": "keep"}) == plain
    assert fingerprint_of(path, {**held_out, "note": "a sentence"}, {"bad_rows": 3}) == plain
    assert fingerprint_of(path, held_out, {"seed": 3}) == plain, "nothing is drawn"
    sampled = {**held_out, "sample": 20}
    assert fingerprint_of(path, sampled, {"seed": 3}) != fingerprint_of(path, sampled, {})


def fingerprint_of(path, keys, data):
    configs = [DatasetConfig("d", path, **keys)]
    return dataset_fingerprints(configs, DataConfig(**data), "m", part="train")["d"]


def test_a_dataset_of_wrong_rows_only_names_the_first(path):
    with pytest.raises(InputError) as caught:
        one(path, columns={"prompt": "question"}, data={"bad_rows": 300})
    told = str(caught.value)
    assert "d: must have at least one row of train, found none in 200 rows; the first wrong" in told
    assert f"{path}:1: unknown columns" in told
