"""Folders and other mixtures become entries of a mixture."""

from pathlib import Path

import datasets
import pytest
import yaml
from support.data.mixtures import config_of, entries, message
from support.data.rows import assistant, user, write

from merit_fast.data import DatasetConfig
from merit_fast.data.mixture.select import MixtureRows
from merit_fast.pipeline.config import read_run_config, write_run_config

PAIR = {"prompt": "a?", "completion": "b"}
OTHER = {"prompt": "c?", "completion": "d"}


@pytest.fixture
def folder(tmp_path):
    """Datasets as files, files by split and subfolders."""
    for name in ("b.jsonl", "c-train.jsonl", "c-test.jsonl", "d e.jsonl", "train/f.jsonl"):
        place = tmp_path / "sets" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        write(place, [PAIR])
    for name in ("train.jsonl", "validation.jsonl"):
        place = tmp_path / "sets" / "a" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        write(place, [PAIR])
    (tmp_path / "sets" / "test").mkdir()
    write(tmp_path / "sets" / "test" / "f.jsonl", [OTHER])
    (tmp_path / "sets" / "README.md").write_text("no rows")
    (tmp_path / "sets" / "empty").mkdir()
    return tmp_path


def test_a_folder_is_a_dataset_for_each_stem_and_subfolder(folder):
    found = entries(folder, {"folder": "sets", "eval_share": 0.1, "max_examples": 9})
    assert list(found) == ["a", "b", "c", "d-e", "f"]
    sets = folder / "sets"
    assert found["a"].path == str(sets / "a") and found["a"].eval_split == "validation"
    assert (found["b"].path, found["b"].eval_share) == (str(sets / "b.jsonl"), 0.1)
    assert found["c"].eval_path == str(sets / "c-test.jsonl") and found["c"].eval_share is None
    assert found["f"].eval_path == str(sets / "test" / "f.jsonl")
    assert {entry.max_examples for entry in found.values()} == {9}
    picked = entries(folder, [{"folder": "sets", "only": ["[a-c]"], "except": "b"}])
    assert list(picked) == ["a", "c"]


def test_a_hundred_datasets_are_one_line(tmp_path):
    (tmp_path / "flan").mkdir()
    for i in range(136):
        rows = [{"question": f"{i}-{j}?", "answer": str(j)} for j in range(20)]
        write(tmp_path / "flan" / f"task{i:03}.jsonl", rows)
    config = config_of(tmp_path, [{"folder": "flan", "eval_share": 0.25, "sample": 5}])
    assert len(config.mixture) == 136
    train = MixtureRows(config.mixture, config.data).select("train")
    assert {len(selection.rows) for selection in train.values()} == {5}


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        ([{"folder": "nowhere"}], "run.yml: mixture[0].folder: must be a folder, got nowhere"),
        ([{"folder": "sets/empty"}], "mixture[0].folder: must hold files of rows, found none in"),
        ([{"folder": "sets", "only": ["z"]}], "mixture[0].only: must name datasets among a, b, c"),
        ([{"folder": "sets", "except": ["*"]}], "mixture[0]: must leave at least one dataset"),
        ([{"folder": "sets", "path": "x"}], "must have one of from, folder, or name and path"),
        ([{"folder": "sets", "eval_shar": 1}], "mixture[0].eval_shar: unknown key; did you mean"),
        ([{"from": "no.yml"}], "no.yml: does not exist"),
        ([{"from": 3}], "mixture[0].from: must be a path, got 3"),
    ],
)
def test_what_no_folder_or_file_holds_is_named(folder, mixture, expected):
    assert expected in message(folder, mixture)


def test_held_out_rows_without_training_rows_are_refused(folder):
    write(folder / "sets" / "g.test.jsonl", [PAIR])
    told = message(folder, [{"folder": "sets"}])
    assert "g.test.jsonl: has the name of held-out rows, and there are no training rows" in told


def test_datasets_that_are_left_out_need_no_training_rows(folder):
    write(folder / "sets" / "g.test.jsonl", [PAIR])
    assert "g" not in entries(folder, [{"folder": "sets", "except": ["g"]}])
    assert list(entries(folder, [{"folder": "sets", "only": ["b"]}])) == ["b"]


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("train-00000-of-00001.jsonl",)])
def test_files_that_are_named_by_their_split_are_one_dataset(tmp_path, names):
    (tmp_path / "facts").mkdir()
    for name, row in zip(names, (PAIR, OTHER), strict=False):
        write(tmp_path / "facts" / name, [row])
    (entry,) = entries(tmp_path, {"folder": "facts"}).values()
    assert (entry.name, entry.path) == ("facts", str(tmp_path / "facts" / names[0]))
    assert entry.eval_path == (str(tmp_path / "facts" / names[1]) if names[1:] else None)


def test_a_saved_dataset_is_one_dataset_of_a_folder(tmp_path):
    rows = datasets.Dataset.from_list([PAIR])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "saved"))
    (entry,) = entries(tmp_path, {"folder": "saved"}).values()
    assert (entry.name, entry.path) == ("saved", str(tmp_path / "saved"))
    assert entry.eval_split == "test"


def test_names_of_any_alphabet_stay_apart(tmp_path):
    (tmp_path / "sets").mkdir()
    for name in ("a b", "a-b", "\u65e5", "\u672c"):
        write(tmp_path / "sets" / f"{name}.jsonl", [PAIR])
    found = entries(tmp_path, {"folder": "sets"})
    assert {name: Path(entry.path).stem for name, entry in found.items()} == {
        "a-b": "a-b",
        "a-b-2": "a b",
        "rows": "\u65e5",
        "rows-2": "\u672c",
    }


def test_a_folder_names_the_files_that_are_no_dataset(folder):
    sets = folder / "sets"
    for name in ("x.zip", "Y.JSONL", ".hidden", "picture.png"):
        (sets / name).touch()
    for name in ("weights", "linked"):
        (sets / name).mkdir()
    (sets / "weights" / "config.json").write_text("{}")
    (sets / "weights" / "model.bin").touch()
    (sets / "linked" / "rows").symlink_to(sets / "train")
    found = entries(folder, [{"folder": "sets"}])
    assert list(found) == ["a", "b", "c", "d-e", "f", "linked"], "linked rows are rows"
    assert found["a"].note == "files of sets not read: Y.JSONL, weights/model.bin, x.zip"
    assert found["b"].note is None


def test_the_expanded_mixture_replays(folder, monkeypatch):
    config = config_of(folder, [{"folder": "sets"}, {"name": "z", "path": "sets/b.jsonl"}])
    (folder / "out").mkdir()
    write_run_config(config, folder / "out" / "config.yml")
    monkeypatch.chdir("/")
    assert read_run_config(folder / "out" / "config.yml").mixture == tuple(
        entry if entry.name != "z" else DatasetConfig("z", str(folder / "sets" / "b.jsonl"))
        for entry in config.mixture
    )


def test_the_command_line_may_give_a_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    config = config_of(folder, [{"name": "z", "path": "sets/b.jsonl"}], "mixture=[{folder: sets}]")
    assert [entry.name for entry in config.mixture] == ["a", "b", "c", "d-e", "f"]


def test_another_mixture_counts_its_paths_from_its_own_folder(folder):
    part = {"mixture": [{"name": "b", "path": "b.jsonl"}, {"name": "x", "path": "owner/x"}]}
    (folder / "sets" / "part.yml").write_text(yaml.safe_dump(part))
    found = entries(folder, [{"from": "sets/part.yml", "weight": 2}])
    assert (found["b"].path, found["b"].weight) == (str(folder / "sets" / "b.jsonl"), 2.0)
    assert found["x"].path == "owner/x"
    (folder / "loop.yml").write_text(yaml.safe_dump([{"from": "loop.yml"}]))
    assert "must not lead back to itself" in message(folder, {"from": "loop.yml"})


def test_alpaca_and_chat_rows_of_one_conversation_share_a_key(tmp_path):
    write(tmp_path / "a.jsonl", [{"instruction": "a?", "output": "b"}])
    write(tmp_path / "b.jsonl", [{"messages": [user("a?"), assistant("b")]}])
    mixture = [{"name": name, "path": f"{name}.jsonl"} for name in "ab"]
    config = config_of(tmp_path, mixture)
    assert MixtureRows(config.mixture, config.data).shared_rows() == {("a", "b"): 1}
