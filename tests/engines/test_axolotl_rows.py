"""axolotl's tokenized rows keep their dataset; a module stands in for axolotl's loader."""

import sys
from types import ModuleType

import pytest
from datasets import Dataset

from merit_fast.errors import InputError, MeritFastError
from merit_fast.integrations.stacks.axolotl_rows import COLUMN, keep_names, without_names

CONFIG = {
    "datasets": [{"path": "a/train_facts.jsonl"}, {"path": "json", "data_files": ["code.jsonl"]}]
}


@pytest.fixture
def loader(monkeypatch):
    names = ("axolotl", "axolotl.utils", "axolotl.utils.data", "axolotl.utils.data.sft")
    modules = {name: ModuleType(name) for name in names}
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, modules[name])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    made = modules[names[-1]]

    def wrap(dataset_config, tokenizer, cfg, dataset=None):
        return Dataset.from_dict({"input_ids": [[value] for value in dataset["text"]]}), "prompter"

    def load(dataset_config, cfg, tokenizer, split, seed):
        raw = Dataset.from_dict({"text": [3, 1, 2], "task": ["b", "a", "b"]})
        return made.get_dataset_wrapper(dataset_config, tokenizer, cfg, dataset=raw)

    made.get_dataset_wrapper = wrap
    made._load_and_process_single_dataset = load
    made.generate_dataset_hash_from_config = lambda cfg, datasets, name: "digest"
    return made


def rows_of(loader, number, split="train"):
    config = dict(CONFIG["datasets"][number])  # axolotl makes copies
    return loader._load_and_process_single_dataset(config, CONFIG, None, split, seed=1)[0]


def test_training_rows_get_their_files_or_given_names_and_a_folder_of_their_own(loader):
    keep_names(CONFIG)
    assert rows_of(loader, 0)[COLUMN] == ["train_facts"] * 3
    assert rows_of(loader, 1)[COLUMN] == ["code"] * 3
    assert COLUMN not in rows_of(loader, 0, split="test").column_names
    assert loader.generate_dataset_hash_from_config(CONFIG, [], "x") == "digest-merit"
    keep_names(CONFIG, ("facts", "programs"))
    rows = rows_of(loader, 1)
    assert rows[COLUMN] == ["programs"] * 3
    assert loader.generate_dataset_hash_from_config(CONFIG, [], "x") == "digest-merit"
    assert without_names(rows).column_names == ["input_ids"]
    assert without_names(None) is None


def test_rows_that_name_their_dataset_keep_their_order(loader):
    keep_names(CONFIG, column="task")
    rows = rows_of(loader, 0)
    assert rows["input_ids"] == [[3], [1], [2]] and rows[COLUMN] == ["b", "a", "b"]
    assert COLUMN not in rows_of(loader, 0, split="test").column_names
    keep_names(CONFIG, column="absent")
    with pytest.raises(InputError, match="merit_column: absent: is no column of the rows"):
        rows_of(loader, 0)


def test_what_cannot_be_told_apart_is_refused(loader):
    with pytest.raises(InputError, match="must name the 2 datasets with merit_losses, got 1 names"):
        keep_names(CONFIG, ("facts",))
    same = {"datasets": [{"path": "a/x.jsonl"}, {"path": "b/x.jsonl"}]}
    with pytest.raises(InputError, match="datasets: two of them are x"):
        keep_names(same)
    with pytest.raises(InputError, match="needs rows that axolotl tokenizes before training"):
        keep_names({**CONFIG, "streaming": True})
    del loader._load_and_process_single_dataset
    with pytest.raises(MeritFastError, match="this axolotl has no _load_and_process"):
        keep_names(CONFIG)
