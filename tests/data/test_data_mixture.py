"""Files, directories and dataset ids to datasets; errors in paths and options."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from support.data.rows import (
    FORMATS,
    GOOD,
    assistant,
    fails,
    load,
    make_tokenizer,
    targets,
    user,
    write,
)

from merit_fast.data import (
    DataConfig,
    Dataset,
    DatasetConfig,
    load_mixture,
)
from merit_fast.data.sources import Source, read_rows
from merit_fast.errors import InputError
from merit_fast.options.parser import parse


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_bom_empty_lines_and_crlf_are_tolerated(tmp_path, tokenizer):
    line = json.dumps(GOOD).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert [where for where, _ in read_rows(Source(str(tmp_path / "a.jsonl")))] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:4",
    ]
    assert load(tmp_path / "a.jsonl", tokenizer).num_examples == 2


def test_line_separators_inside_strings_do_not_end_lines(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a\u2028b\x85c", "completion": "d"}, GOOD])
    assert load(path, tokenizer).num_examples == 2


def same(a: Dataset, b: Dataset) -> bool:
    return [(e.input_ids.tolist(), e.labels.tolist()) for e in a.examples] == [
        (e.input_ids.tolist(), e.labels.tolist()) for e in b.examples
    ]


def test_jsonl_parquet_directory_and_hub_agree(tmp_path, tokenizer, monkeypatch):
    import datasets

    rows = [{"messages": [user(f"{i}?"), assistant(f"{i}")]} for i in range(150)]
    whole = load(write(tmp_path / "rows.jsonl", rows), tokenizer)
    assert whole.num_examples == 150 and targets(tokenizer, whole.examples[149]) == [
        "149<|im_end|>"
    ]
    assert same(whole, load(write(tmp_path / "rows.parquet", rows), tokenizer))
    parts = tmp_path / "parts"
    parts.mkdir()
    write(parts / "b.parquet", rows[70:])
    write(parts / "a.jsonl", rows[:70])
    (parts / "README.md").write_text("not data")
    (parts / "._a.jsonl").write_bytes(b"\xff")
    assert same(whole, load(parts, tokenizer))
    assert load(parts, tokenizer, max_examples=80).num_examples == 80

    hub = tmp_path / "hub"
    hub.mkdir()
    write(hub / "train-0.jsonl", rows)
    write(hub / "test-0.jsonl", rows[:3])
    really_load = datasets.load_dataset
    asked = []

    def load_dataset(path, *, split):
        asked.append((path, split))
        return really_load(str(hub), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert same(whole, load("owner/name", tokenizer))
    assert (
        load("owner/name", tokenizer, part="eval", eval_split="test", max_examples=1).num_examples
        == 3
    )
    assert set(asked) == {("owner/name", "train"), ("owner/name", "test")}


def test_paths_that_hold_nothing(tmp_path, tokenizer, monkeypatch):
    import datasets

    def message(path):
        with pytest.raises(InputError) as caught:
            load(path, tokenizer)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.chdir(tmp_path)
    assert (
        message("data/no.jsonl")
        == "data/no.jsonl: is neither a file, nor a directory, nor a Hugging Face dataset id"
    )
    assert message("/no/such").startswith("/no/such: is neither")
    Path("empty").mkdir()
    assert message("empty").startswith("empty: the directory must hold files of rows (")
    write(Path("short.parquet"), [GOOD])
    os.truncate("short.parquet", 60)
    assert message("short.parquet").startswith(
        "short.parquet: is not readable Parquet after row 0: "
    )
    write(Path("bad.parquet"), [GOOD, GOOD, {"prompt": "a", "completion": None}])
    assert message("bad.parquet").startswith("bad.parquet: row 3: completion: must be")

    def load_dataset(path, *, split):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    told = "owner/name: neither a file nor a folder, and the hub is {} (Hugging Face dataset, {})"
    split = "split 'train'"
    assert message("owner/name") == told.format("switched off (HF_HUB_OFFLINE)", split)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert message("owner/name") == told.format("unreachable", split)
    for path in ("./owner/name", "~/owner/name", "a/b/c", "../name", "rows.jsonl", "rows.json"):
        assert message(path).startswith(f"{path}: is neither"), path
    Path("owner").mkdir()
    assert message("owner/name").startswith("owner/name: is neither")


def test_unused_columns_are_noted_or_refused(tmp_path, tokenizer):
    rows = [{**GOOD, "id": 1, "label": None}, {"prompt": "b?", "completion": "c", "source": "x"}]
    assert load(write(tmp_path / "a.jsonl", rows), tokenizer).notes == (
        "columns not used: id, source",
    )
    message = fails(tmp_path, tokenizer, [GOOD, {**GOOD, "category": "x"}])
    assert message == (
        "bad.jsonl:2: column category of dataset d: must be named under columns or listed in "
        "data.ignore_columns, as nothing reads it, got 'x'"
    )
    data = DataConfig(ignore_columns=("category",))
    rows = [GOOD, {"prompt": "b?", "completion": "c", "category": "x"}]
    assert load(write(tmp_path / "b.jsonl", rows), tokenizer, data=data).notes == ()


def test_mixture_order_eval_part_and_rules(tmp_path, tokenizer):
    a = write(tmp_path / "a.jsonl", [GOOD, GOOD])
    b = write(tmp_path / "b.jsonl", [GOOD])
    data = DataConfig(leaks="keep")
    configs = [DatasetConfig("z", b), DatasetConfig("a", a, eval_path=b, max_examples=1)]
    train = load_mixture(configs, tokenizer, data, part="train")
    assert [(dataset.name, dataset.num_examples) for dataset in train] == [("z", 1), ("a", 1)]
    held_out = load_mixture(configs, tokenizer, data, part="eval")
    assert [(dataset.name, dataset.num_examples) for dataset in held_out] == [("a", 1)]

    def rule(*configs):
        with pytest.raises(InputError) as caught:
            load_mixture(configs, tokenizer, DataConfig(), part="train")
        return str(caught.value)

    assert (
        rule(configs[0], configs[0])
        == "mixture: name: must differ between datasets, got 'z' 2 times"
    )
    shared = rule(DatasetConfig("d", str(tmp_path), eval_path=a))
    assert shared == f"mixture: d: eval_path: must hold other files than path, got {a} in both"
    absent = f"{a}: split: must be absent for one file"
    assert absent in rule(DatasetConfig("d", a, split="test"))
    assert absent in rule(DatasetConfig("d", a, eval_split="test"))
    assert absent in rule(DatasetConfig("d", "o/n", eval_path=a, eval_split="test"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "a/b"}, "m.yaml: mixture[0].name: must be a file name of"),
        ({"name": ".."}, "m.yaml: mixture[0].name: must be a file name of"),
        ({"name": "a\n"}, "m.yaml: mixture[0].name: must be a file name of"),
        ({"max_examples": 0}, "m.yaml: mixture[0].max_examples: must be at least 1, got 0"),
        ({"eval_split": "train"}, "m.yaml: mixture[0].eval_split: must be another split"),
        ({"path": ""}, "m.yaml: mixture[0].path: must be a file, directory or dataset id, got ''"),
        ({"pth": "x"}, "m.yaml: mixture[0].pth: unknown key; did you mean path?"),
    ],
)
def test_dataset_config_rules(keys, message):
    with pytest.raises(InputError) as caught:
        parse(DatasetConfig, {"name": "d", "path": "p.jsonl"} | keys, "m.yaml", "mixture[0]")
    assert str(caught.value).startswith(message)


def test_too_long(tmp_path, tokenizer):
    long = {
        "messages": [
            user("1"),
            assistant("one two three"),
            user("x" * 50),
            assistant("never reached"),
        ]
    }
    good = FORMATS["messages"]
    unanswered = {"messages": [user("y" * 200), assistant("z")]}
    path = write(tmp_path / "a.jsonl", [long, good, long, unanswered])
    whole = load(path, tokenizer)
    limit = 60
    dataset = load(path, tokenizer, data=DataConfig(max_length=limit))
    assert [targets(tokenizer, example) for example in dataset.examples] == [
        ["one two three<|im_end|>"],
        ["Paris<|im_end|>"],
        ["one two three<|im_end|>"],
    ]
    cut = len(dataset.examples[0].input_ids)
    assert np.array_equal(dataset.examples[0].input_ids, whole.examples[0].input_ids[:cut])
    assert dataset.notes == (
        "2 rows longer than 60 tokens were truncated",
        "1 row longer than 60 tokens was dropped because truncation would leave no answer",
        "1 row equal to an earlier row (data.duplicates: drop removes them)",
    )
    dropped = load(path, tokenizer, data=DataConfig(max_length=limit, too_long="drop"))
    assert dropped.num_examples == 1 and dropped.notes == (
        "3 rows longer than 60 tokens were dropped",
        "1 row equal to an earlier row (data.duplicates: drop removes them)",
    )
    error = fails(tmp_path, tokenizer, [good, long], max_length=limit, too_long="error")
    length = len(whole.examples[0].input_ids)
    assert error == f"bad.jsonl:2: must have at most data.max_length = 60 tokens, got {length}"
    exact = DataConfig(max_length=length, too_long="error")
    assert load(write(tmp_path / "b.jsonl", [long]), tokenizer, data=exact).num_examples == 1
    none = fails(tmp_path, tokenizer, [long, long], max_length=2)
    assert none.startswith(
        "bad.jsonl: dataset d: must have a row with an answer within data.max_length = 2 tokens"
    )
