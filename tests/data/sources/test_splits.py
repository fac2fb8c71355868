"""A source reads the split that it names, of folders, clones, globs and stores."""

import contextlib
import json
from pathlib import Path

import datasets
import fsspec
import pytest
from datasets.data_files import get_data_patterns, resolve_pattern
from support.data.rows import GOOD, make_tokenizer, write

from merit_fast.data import DataConfig, DatasetConfig, load_mixture, mixture_fingerprint
from merit_fast.data.sources import (
    Source,
    files_of,
    read_rows,
    source_content,
    splits_of,
    unread_files,
)
from merit_fast.errors import InputError
from merit_fast.manifests.hashes import checksum
from merit_fast.pipeline.config import read_run_config, write_run_config


def make(folder: Path, *names: str) -> Path:
    """A folder of these files of rows; each row knows its file."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    return folder


def texts(source: Source) -> list[str]:
    return [row["text"] for _, row in read_rows(source)]


def fails(source: Source) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


FOLDERS = [
    ("train.jsonl", "validation.jsonl", "test.jsonl"),
    ("b.jsonl", "a.jsonl", "sub/c.jsonl"),
    ("data/train-00000-of-00002.json", "data/train-00001-of-00002.json"),
    ("data/train-00000-of-00001.json", "data/gold-00000-of-00001.json", "test.jsonl"),
    ("my_train_1.jsonl", "my-dev.jsonl", "eval 2.csv", "contest.jsonl"),
    ("training/a.jsonl", "evaluation/a.jsonl", "evaluation/b.jsonl"),
    ("en/train/a.jsonl", "de/train/a.jsonl", "de/valid/test.jsonl"),
    ("x.val.jsonl", "x.train.jsonl", "x.trainer.jsonl"),
    ("test_a.jsonl",),
    ("devices/a.jsonl", "latest.jsonl", "retrain.jsonl"),
]


@pytest.mark.parametrize("names", FOLDERS)
def test_names_tell_the_split_as_in_datasets(tmp_path, names):
    make(tmp_path, *names)
    patterns = get_data_patterns(str(tmp_path))

    def resolve(globs: list[str]) -> list[str]:
        found = set()
        for pattern in globs:
            with contextlib.suppress(FileNotFoundError):
                found.update(resolve_pattern(pattern, str(tmp_path)))
        return sorted(found)

    expected = {str(split): resolve(globs) for split, globs in patterns.items()}
    assert splits_of(Source(str(tmp_path))) == expected
    for split, files in expected.items():
        relative = [str(Path(file).relative_to(tmp_path)) for file in files]
        if not any(name.endswith(".csv") for name in relative):
            assert texts(Source(str(tmp_path), split)) == relative


def test_a_folder_with_a_test_file_trains_on_the_training_file_only(tmp_path):
    make(tmp_path, "train.jsonl", "test.jsonl", "dev.jsonl", "extra.jsonl", "a.zip", "README.md")
    path = str(tmp_path)
    assert texts(Source(path)) == ["train.jsonl"]
    assert texts(Source(path, "test")) == ["test.jsonl"]
    assert texts(Source(path, "validation")) == texts(Source(path, "dev")) == ["dev.jsonl"]
    assert texts(Source(path, "train+test")) == ["train.jsonl", "test.jsonl"]
    assert unread_files(Source(path)) == ("a.zip", "extra.jsonl")
    assert "split: must be one that is there, got 'gold', found" in fails(Source(path, "gold"))
    assert "split: must be an expression of splits" in fails(Source(path, "train[:x%]"))
    assert "rows must ascend" in fails(Source(path, "train+train"))


def test_letters_count_without_their_case(tmp_path):
    make(tmp_path, "Train.jsonl", "Test.jsonl")
    assert texts(Source(str(tmp_path))) == ["Train.jsonl"]


def test_a_folder_of_one_split_is_no_training_data_by_accident(tmp_path):
    make(tmp_path, "test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl")
    assert "got 'train', found test (" in fails(Source(str(tmp_path)))
    assert len(texts(Source(str(tmp_path), any_split=True))) == 2


def test_a_name_with_two_splits_is_refused(tmp_path):
    make(tmp_path, "train_test.jsonl")
    assert "train_test.jsonl: must carry one split in its name" in fails(Source(str(tmp_path)))


def test_data_files_replace_the_search(tmp_path):
    make(tmp_path, "a/test.jsonl", "a/b/c.jsonl", "d.jsonl")
    path = str(tmp_path)
    assert texts(Source(path, data_files=("d.jsonl", "a/*"))) == ["d.jsonl", "a/test.jsonl"]
    assert texts(Source(path, data_files=("a/**/*.jsonl",))) == ["a/b/c.jsonl", "a/test.jsonl"]
    assert "data_files: must match files of rows, got 'no*'" in fails(
        Source(path, data_files=("no*",))
    )


def test_globs_follow_the_names(tmp_path):
    make(tmp_path, "a/train.jsonl", "b/train.jsonl", "b/test.jsonl", "b/rows.txt")
    assert texts(Source(f"{tmp_path}/*/*")) == ["a/train.jsonl", "b/train.jsonl"]
    assert texts(Source(f"{tmp_path}/**/*.jsonl", "test")) == ["b/test.jsonl"]
    assert texts(Source(f"{tmp_path}/b/te*", "test")) == ["b/test.jsonl"]
    assert "must match files of rows, found none" in fails(Source(f"{tmp_path}/*.parquet"))
    assert "found only" in fails(Source(f"{tmp_path}/b/*.txt"))


CARD = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: "en/part-*.jsonl"}
  - split: test
    path: [en/held.jsonl]
- config_name: de
  default: true
  data_dir: de
- config_name: odd
  data_files: en/held.jsonl
  sep: ";"
---
# A dataset
"""


def test_the_card_of_a_clone_tells_configurations_and_splits(tmp_path):
    make(tmp_path, "en/part-1.jsonl", "en/part-2.jsonl", "en/held.jsonl", "de/train.jsonl")
    make(tmp_path, "de/test.jsonl")
    (tmp_path / "README.md").write_text(CARD)
    path = str(tmp_path)
    assert texts(Source(path)) == ["de/train.jsonl"]
    assert texts(Source(path, "test")) == ["de/test.jsonl"]
    assert texts(Source(path, config="en")) == ["en/part-1.jsonl", "en/part-2.jsonl"]
    assert texts(Source(path, "test", config="en")) == ["en/held.jsonl"]
    assert "config: must be one of en, de, odd, got 'fr'" in fails(Source(path, config="fr"))
    assert "configs: odd: sep: is an option of the reader" in fails(Source(path, config="odd"))
    (tmp_path / "README.md").write_text(CARD.replace("default: true", "drop_labels: true"))
    assert "config: must be one of en, de, odd, got none" in fails(Source(path))
    (tmp_path / "README.md").write_text("no card")
    assert "it declares none" in fails(Source(path, config="en"))


def test_keys_of_the_hub_are_refused_for_files(tmp_path):
    make(tmp_path, "a.jsonl")
    file = str(tmp_path / "a.jsonl")
    assert "revision: must be absent for files, got 'main'" in fails(Source(file, revision="main"))
    assert "config: must be absent for files" in fails(Source(file, config="en"))
    assert "revision: must be absent" in fails(Source(str(tmp_path), revision="main"))
    assert "split: must be absent for one file" in fails(Source(file, "test"))


def test_stores_are_read_as_folders_are(tmp_path):
    store = fsspec.filesystem("memory")
    for name in ("train.jsonl", "sub/test.jsonl", ".hidden.jsonl"):
        with store.open(f"/rows/{name}", "w") as file:
            file.write(json.dumps({"text": name}))
    try:
        url = "memory://rows"
        assert texts(Source(url)) == ["train.jsonl"]
        assert texts(Source(url, "test")) == ["sub/test.jsonl"]
        assert texts(Source(f"{url}/train.jsonl")) == ["train.jsonl"]
        assert texts(Source(f"{url}/*.jsonl")) == ["train.jsonl"]
        before = source_content(Source(url), checksum)
        with store.open("/rows/train.jsonl", "w") as file:
            file.write(json.dumps({"text": "longer than before"}))
        assert source_content(Source(url), checksum) != before
    finally:
        store.rm("/rows", recursive=True)
    assert "is neither a file nor a folder in its store" in fails(
        Source("memory://rows/train.jsonl")
    )
    make(tmp_path, "a.jsonl")
    assert texts(Source(f"file://{tmp_path}/a.jsonl")) == ["a.jsonl"]


def test_hub_datasets_get_every_key(tmp_path, monkeypatch):
    make(tmp_path, *(f"{i}.jsonl" for i in range(5)))
    really_load = datasets.load_dataset
    asked = {}

    def load_dataset(path, **keys):
        asked.update(keys, path=path)
        return really_load(str(tmp_path), split=keys["split"], cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source("o/n", "train[:60%]", "en", "v2", ("*.jsonl",))
    assert files_of(source) is splits_of(source) is None
    assert [place for place, _ in read_rows(source, [0, 2])] == [
        "o/n (train[:60%]): row 1",
        "o/n (train[:60%]): row 3",
    ]
    assert asked == {
        "path": "o/n",
        "split": "train[:60%]",
        "name": "en",
        "revision": "v2",
        "data_files": ["*.jsonl"],
    }


def test_the_parts_of_an_entry_are_splits_of_one_folder(tmp_path):
    make(tmp_path, "train.jsonl", "test.jsonl")
    entry = DatasetConfig("d", str(tmp_path), eval_split="test")

    def mark(entry):
        return mixture_fingerprint([entry], DataConfig(), "o/n")

    before = mark(entry)
    sliced = DatasetConfig("d", str(tmp_path), split="train[:50%]", eval_split="train[50%:]")
    assert mark(sliced) != before
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    assert mark(entry) != before


def test_the_plan_names_files_that_are_not_read(tmp_path):
    make(tmp_path, "train.jsonl", "test.jsonl", "extra.jsonl", "images.zip", "README.md", "a.png")
    (tmp_path / "train.jsonl").write_text(json.dumps(GOOD))
    [dataset] = load_mixture(
        [DatasetConfig("d", str(tmp_path))], make_tokenizer(), DataConfig(), part="train"
    )
    assert dataset.notes == ("files not read: extra.jsonl, images.zip",)


def test_a_run_leaves_urls_as_they_are(tmp_path):
    url = "s3://bucket/rows/*.jsonl"
    path = tmp_path / "m.yml"
    path.write_text(f"model: o/n\nmixture: [{{name: d, path: '{url}'}}]\n")
    config = read_run_config(path)
    assert config.mixture[0].path == url
    write_run_config(config, tmp_path / "again.yml")
    assert read_run_config(tmp_path / "again.yml").mixture[0].path == url


def test_links_are_followed_and_never_back_into_a_folder_above(tmp_path):
    (tmp_path / "rows" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    write(tmp_path / "rows" / "a.jsonl", [{"prompt": "a?", "completion": "b"}])
    write(tmp_path / "other" / "c.jsonl", [{"prompt": "c?", "completion": "d"}])
    (tmp_path / "rows" / "sub" / "loop").symlink_to(tmp_path / "rows")
    (tmp_path / "rows" / "sub" / "out").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "rows" / "sub")
    files = files_of(Source(str(tmp_path / "rows")))
    assert [file.removeprefix(f"{tmp_path}/") for file in files] == [
        "rows/a.jsonl",
        "rows/sub/out/c.jsonl",
    ]


def test_a_reader_of_datasets_is_no_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="^json: path: must be a dataset, and this is a reader"):
        files_of(Source("json", data_files=("a.jsonl",)))
    (tmp_path / "json").mkdir()
    write(tmp_path / "json" / "a.jsonl", [{"prompt": "a?", "completion": "b"}])
    assert files_of(Source("json")) == ["json/a.jsonl"]
